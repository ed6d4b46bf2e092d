"""Ablations on the built-in world: `composer sweep --config ablations/NAME --out DIR`."""

from collections.abc import Mapping, Sequence


def sweep(runs: Mapping[str, Sequence[str]]) -> dict:
    """Runs of `scenes64:ablation` over two seeds, measured on 128 held-out scenes."""
    return {
        "config": "scenes64:ablation",
        "runs": runs,
        "seeds": (0, 1),
        "evaluate": ("--count", 128, "--seeds", 1, "--few", 32, "--experiments", "pairs"),
    }
