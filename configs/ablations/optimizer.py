"""AdamW against Muon, and how large a step."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep(
        {
            f"{name} {rate}": [f"optimizer.name={name}", f"optimizer.learning_rate={rate}"]
            for name, rate in (("adamw", 1e-3), ("adamw", 2e-3), ("muon", 2e-3), ("muon", 4e-3))
        }
    )
