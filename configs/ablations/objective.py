"""What the network predicts: flow, or eps and v on Stable Diffusion's schedule."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    kinds = {"flow": ("flow", "flow"), "eps": ("eps", "sd"), "v": ("v", "sd")}
    runs = {
        name: [f"process.prediction={prediction}", f"process.schedule={schedule}"]
        for name, (prediction, schedule) in kinds.items()
    }
    return sweep({**runs, "v, min-SNR 5": [*runs["v"], "process.min_snr=5"]})
