"""How long the average of the weights is that is sampled from."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep({f"decay {decay}": [f"ema={decay}"] for decay in (0.0, 0.9, 0.97, 0.999)})
