"""How training times are drawn on the flow schedule: logit-normal or uniform."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep({word: [f"process.density={word}"] for word in ("logit-normal", "uniform")})
