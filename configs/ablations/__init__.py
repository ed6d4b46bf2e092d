"""Ablations on the built-in world: `composer sweep --config ablations/NAME --out DIR`."""

from collections.abc import Mapping, Sequence


def sweep(runs: Mapping[str, Sequence[str]]) -> dict:
    """Runs of `scenes64:ablation` over two seeds, measured on 64 held-out scenes."""
    return {
        "config": "scenes64:ablation",
        "runs": runs,
        "seeds": (0, 1),
        "evaluate": ("--count", 64, "--seeds", 1, "--steps", 8, "--experiments", "alone"),
    }
