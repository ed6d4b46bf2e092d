"""How often a condition is kept in training (arXiv 2302.09778 has 0.5, 0.3 for intensity)."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep(
        {
            f"keep {chance}": [f"keep={chance}", f"keep_maps={chance}"]
            for chance in (0.1, 0.3, 0.5, 0.7)
        }
    )
