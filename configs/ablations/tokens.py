"""How many context tokens a vector becomes (arXiv 2302.09778 has 4)."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep(
        {
            f"{count} tokens": [f"model.tokens_per_vector={count}", "model.context_length=96"]
            for count in (1, 4, 8)
        }
    )
