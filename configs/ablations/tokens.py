"""How many context tokens a vector becomes (arXiv 2302.09778 has 4)."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep({f"{n} tokens": [f"model.tokens_per_vector={n}"] for n in (4, 8)})
