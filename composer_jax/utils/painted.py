"""What is painted where: regions and masks of any kind of array as numbers from 0 to 1."""

from __future__ import annotations

from typing import Any

import numpy as np


def painted(value: Any, what: str) -> np.ndarray:
    """How white each pixel is painted, float32 [H, W] in [0, 1]; what is transparent is not.

    `value`: [H, W] of bool, float or whole numbers in [0, 1]; or an image: uint8 or uint16 [H, W],
    or [H, W, C] of any kind of number with C = 1 (grey), 2 (grey and alpha), 3 or 4 (alpha), whose
    white is the first of 1, 255 and, of uint16, 65535 that nothing exceeds. `what` names it in
    errors. Raises ValueError for another shape, kind or range.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.dtype.kind not in "buif":
        raise ValueError(f"{what} is a {type(value).__name__}; an array of numbers is wanted")
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] > 4):
        raise ValueError(f"{what} has shape {array.shape}; [h, w] is wanted, or an image")
    low, high = float(array.min()), float(array.max())
    image = array.ndim == 3 or array.dtype in (np.uint8, np.uint16)
    whole = array.dtype.kind in "ui" or (high == 255.0 and bool(np.all(array % 1 == 0)))
    white = 65535.0 if array.dtype == np.uint16 and high > 255.0 else 255.0
    top = white if image and whole and high > 1.0 else 1.0
    if not 0.0 <= low <= high <= top:
        raise ValueError(f"{what} has values from {low:g} to {high:g}; 0 to 1 is wanted")
    layers = (array if array.ndim == 3 else array[..., None]).astype(np.float32) / np.float32(top)
    if layers.shape[2] in (1, 3):
        return layers.mean(axis=2)
    return layers[..., :-1].mean(axis=2) * layers[..., -1]
