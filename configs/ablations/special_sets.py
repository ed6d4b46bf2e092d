"""With and without the examples that drop, and that keep, every condition."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep(
        {
            f"drop all {drop}, keep all {keep}": [f"drop_all={drop}", f"keep_all={keep}"]
            for drop in (0.0, 0.1)
            for keep in (0.0, 0.1)
        }
    )
