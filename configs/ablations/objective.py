"""What the network predicts: v or flow on the flow schedule, eps or v on Stable Diffusion's."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    kinds = {
        "v, flow's schedule": ("v", "flow"),
        "flow": ("flow", "flow"),
        "eps, SD's schedule": ("eps", "sd"),
        "v, SD's schedule": ("v", "sd"),
    }
    runs = {
        name: [f"process.prediction={prediction}", f"process.schedule={schedule}"]
        for name, (prediction, schedule) in kinds.items()
    }
    return sweep({**runs, "min-SNR 5": [*runs["v, SD's schedule"], "process.min_snr=5"]})
