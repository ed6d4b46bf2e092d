"""How images obey what they were given: each condition taken out again, and which pull apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.conditions.decompose import decompose
from composer_jax.diffusion import Use

APART = -0.1  # mean cosine below which two conditions are said to pull apart


@dataclass(frozen=True)
class Obedience:
    """One use of a condition in several images: the condition's own measure of each, 1 is perfect.

    `got`: what was taken out of each image again, stored; None where nothing can be. `reason`: why
    nothing was measured.
    """

    name: str
    use: Use
    scores: np.ndarray
    got: list[Any]
    reason: str = ""


def obedience(
    uses: Mapping[str, Sequence[Use]], images: np.ndarray, tools: Mapping[str, Any]
) -> list[Obedience]:
    """Measures every positive use of a stored value in images uint8 [N, H, W, 3].

    A condition without a map is measured inside the box of its region, if it has one. `tools`: by
    name, as conditions ask for them.
    """
    return [
        _measured(name, one, images, tools)
        for name, candidates in uses.items()
        for one in candidates
        if not one.negative
    ]


def _measured(name: str, use: Use, images: np.ndarray, tools: Mapping[str, Any]) -> Obedience:
    condition = conditions.get(name)
    tool = tools.get(condition.tool)
    if use.region is not None and not condition.spatial:
        images = images[:, *_box(use.region, images.shape[1:3])]
    try:
        scores = np.array([condition.measure(use.value, image, tool) for image in images])
    except ValueError as error:
        return Obedience(name, use, np.array([]), [None] * len(images), str(error))
    return Obedience(name, use, scores, [taken_out(condition, image, tool) for image in images])


def taken_out(condition, image: np.ndarray, tool: Any) -> Any:
    """The condition of an image, or None where only a source knows it (a caption)."""
    try:
        return decompose(image, only=[condition.name], tools={condition.tool: tool})[condition.name]
    except ValueError:
        return None


def _box(region: np.ndarray, size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of images of `size` that a region [h, w] spans."""
    spans = []
    for axis in range(2):
        inside = np.flatnonzero(np.any(region >= 0.5 * region.max(), axis=1 - axis))
        scale = size[axis] / region.shape[axis]
        spans.append(slice(int(inside[0] * scale), int(np.ceil((inside[-1] + 1) * scale))))
    return tuple(spans)


def pairs(names: Sequence[str], cosines: np.ndarray) -> list[tuple[str, str, float, float, float]]:
    """Of cosines [S, m, m] between directions of guidance: for each pair the mean over the first
    half of the evaluations, over the second, and over all; the pair that differs most first."""
    half = (len(cosines) + 1) // 2
    rows = [
        (
            names[i],
            names[j],
            float(cosines[:half, i, j].mean()),
            float(cosines[half:, i, j].mean()) if half < len(cosines) else float("nan"),
            float(cosines[:, i, j].mean()),
        )
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    return sorted(rows, key=lambda row: row[-1])
