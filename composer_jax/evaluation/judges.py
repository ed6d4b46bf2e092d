"""The frozen networks that judge samples of the built-in world."""

from __future__ import annotations

from typing import Any

import numpy as np

from composer_jax.data.tools import load_tools
from composer_jax.evaluation.facts import FactReader
from composer_jax.storage.models import find_part, load_objects


def scenes_judges() -> dict[str, Any]:
    """Tools by name: depth's regressor, the object detector as segmenter and as caption reader."""
    detector = load_objects(find_part("bundled", "objects"))
    look = detector.look()

    def segment(images: np.ndarray) -> np.ndarray:
        return np.stack([ids for ids, _ in look(images)])

    tools = load_tools(depth="bundled")
    return {**tools, "segmenter": segment, "reader": FactReader(detector)}
