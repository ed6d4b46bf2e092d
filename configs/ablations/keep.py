"""How often a condition is kept in training (arXiv 2302.09778 has 0.5, 0.3 for intensity)."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    chances = {f"keep {p}": [f"keep={p}", f"keep_maps={p}"] for p in (0.1, 0.3, 0.5, 0.7)}
    return sweep(chances | {"keep 0.4, maps 0.15": ["keep=0.4", "keep_maps=0.15"]})
