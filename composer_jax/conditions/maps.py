"""Reading maps, whose numbers mean something: depth, ids; 16 bits stay 16 bits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from composer_jax.conditions.image import load_array, load_numbers

MAX_IDS = 32  # of an image's instances, with the background, id 0


def load_map(source) -> np.ndarray:
    """Reads a map as it is: [H, W], or [H, W, 3] and, with alpha, [H, W, 4]; from an image file
    (`load_numbers`), a .npy file (any shape) or an array.

    Raises ValueError, one line naming the file, as `load_image` does.
    """
    if not isinstance(source, str | os.PathLike):
        return np.asarray(source)
    if Path(source).suffix.lower() == ".npy":
        return load_array(source)
    return load_numbers(source)


def grey(image: np.ndarray) -> np.ndarray | None:
    """The one channel of a grey map, [H, W] as it is or [H, W, C]; None where it is in colour.

    The small differences between channels that JPEG makes are no colour.
    """
    if image.ndim == 2:
        return image
    if image.ndim != 3 or not image.size or not 1 <= image.shape[2] <= 4:
        return None
    if image.shape[2] < 3:
        return image[..., 0]
    rgb = image[..., :3].astype(np.float64)
    spread = np.mean(rgb.max(axis=2) - rgb.min(axis=2))
    return image[..., 0] if spread <= 0.01 * max(rgb.max(), 1e-12) else None


def renumber(ids: np.ndarray, values: np.ndarray, numbers) -> np.ndarray:
    """Each of the sorted `values` in `ids` becomes its number, all else 0."""
    if not len(values):
        return np.zeros_like(ids)
    place = np.searchsorted(values, ids).clip(0, len(values) - 1)
    return np.where(values[place] == ids, np.asarray(numbers)[place], 0)


def run_tool(tool, images, what: str) -> np.ndarray:
    """The maps [B, H, W] that a tool gives for images uint8 [B, H, W, 3]; `what` names the tool.

    Raises ValueError for a result of another shape.
    """
    maps = np.asarray(tool(images))
    if maps.shape[0] != len(images) or maps.ndim != 3:
        raise ValueError(
            f"{what} gave {list(maps.shape)} for images {list(np.shape(images))}; "
            "[B, H, W] is wanted"
        )
    return maps
