"""How training times are drawn on the flow schedule: logit-normal, nearer to noise, or uniform."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    runs = {word: [f"process.density={word}"] for word in ("uniform", "logit-normal")}
    nearer = [*runs["logit-normal"], "process.location=1.0"]
    return sweep({**runs, "logit-normal around 0.73": nearer})
