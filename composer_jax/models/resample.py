"""Resampling of images as PyTorch's `interpolate` does it, by one small matrix an axis.

Shapes are static under XLA, so the matrices are constants, and the work is two products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("bilinear", "bicubic", "corners")
SHARPNESS = -0.75  # the parameter a of cubic convolution (Keys 1981) in PyTorch and OpenCV


def resample_matrix(source: int, target: int, kind: str) -> Float[np.ndarray, "t s"]:
    """What turns `source` samples into `target` ones: float32 [target, source], rows sum to 1.

    `kind`: "bilinear" and "bicubic" take pixels as areas and never blur (align_corners=False, no
    antialias); "corners" is bilinear between the outermost pixels' centres (align_corners=True).
    """
    if kind not in KINDS:
        raise ValueError(f"resampling is {kind!r}; allowed: {', '.join(KINDS)}")
    places = np.arange(target, dtype=np.float32)
    if kind == "corners":
        places = places * np.float32((source - 1) / max(target - 1, 1))
    else:
        places = (places + np.float32(0.5)) * np.float32(source / target) - np.float32(0.5)
    if kind == "bilinear":
        places = np.maximum(places, 0)
    first = np.floor(places)
    t = places - first
    taps = {0: 1 - t, 1: t}
    if kind == "bicubic":
        taps = {-1: _outer(1 + t), 0: _inner(t), 1: _inner(1 - t), 2: _outer(2 - t)}
    matrix, rows = np.zeros((target, source), np.float32), np.arange(target)
    for offset, weights in taps.items():
        matrix[rows, np.clip(first.astype(int) + offset, 0, source - 1)] += weights
    return matrix


def resample(
    x_BxhxwxC: Float[Array, "b h w c"], shape: tuple[int, int], kind: str
) -> Float[Array, "b H W c"]:
    """Images at another size: [B, h, w, C] to [B, *shape, C], `kind` as in `resample_matrix`."""
    if x_BxhxwxC.shape[1:3] == tuple(shape):
        return x_BxhxwxC
    rows, columns = (
        jnp.asarray(resample_matrix(source, target, kind), x_BxhxwxC.dtype)
        for source, target in zip(x_BxhxwxC.shape[1:3], shape, strict=True)
    )
    exact = jax.lax.Precision.HIGHEST
    x_BxHxwxC = jnp.einsum("Hh,bhwc->bHwc", rows, x_BxhxwxC, precision=exact)
    return jnp.einsum("Ww,bHwc->bHWc", columns, x_BxHxwxC, precision=exact)


def _inner(x: np.ndarray) -> np.ndarray:
    a = np.float32(SHARPNESS)
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _outer(x: np.ndarray) -> np.ndarray:
    a = np.float32(SHARPNESS)
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
