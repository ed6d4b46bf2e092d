"""Mask: the part of an image that stays; the rest is a hole to be filled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, register
from composer_jax.conditions.image import fit_map, load_image, load_rgba
from composer_jax.conditions.maps import MAX_IDS

ALLOWED = "allowed: IMAGE:MASK (white is kept), or one image with transparency (that is the hole)"
NUMBERS = 34  # uniform numbers that the largest kind of hole takes


class Mask(Condition):
    """The masked image and its mask (1 = keep), as four channels (Composer, 3.1)."""

    name = "mask"
    doc = "what stays of an image, as IMAGE:MASK (white stays) or one image with transparency"
    keep_probability = 0.5
    parts: Mapping[str, Part] = {"map": Part("spatial", (4,))}
    feature: Mapping[str, Feature] = {
        "image": Feature(("h", "w", 3), "uint8", "png", "photo"),
        "keep": Feature(("h", "w"), "uint8", "png", "nearest"),
    }
    cached = False
    draws_from = "instances"

    def extract(self, images, given=None, tool=None):
        """Images uint8 [B, H, W, 3] with `given["mask"]` [B, H, W] (bool, 0 to 1, or uint8 0 to
        255; high is kept), else with a box in the middle, half as high and wide, as the hole.

        Raises ValueError where the given mask has another size.
        """
        del tool
        images = np.asarray(images, np.uint8)
        given_keep = (given or {}).get("mask")
        if given_keep is None:
            keep = np.repeat(_frame(*images.shape[1:3])[None], len(images), axis=0)
        else:
            keep = _binary(np.asarray(given_keep))
        if keep.shape != images.shape[:3]:
            raise ValueError(f"mask has shape {keep.shape}; the images ask for {images.shape[:3]}")
        return {"image": images, "keep": keep}

    def draw(self, key, stored, image):
        """A random hole in `image` float32 [H, W, 3]: boxes, free strokes, a blob, or one of the
        instances in `stored` (those of the condition `instances`, or None); one in four is turned
        around, so that only what was drawn is kept. Returns [H, W, 4]."""
        u = jax.random.uniform(key, (2 + NUMBERS,))
        y_Hx1 = ((jnp.arange(image.shape[0]) + 0.5) / image.shape[0])[:, None]
        x_1xW = ((jnp.arange(image.shape[1]) + 0.5) / image.shape[1])[None, :]
        holes = [kind(u[2:], y_Hx1, x_1xW) for kind in (_boxes, _strokes, _blob)]
        if stored is not None:
            holes.append(_instance(u[2:], stored["ids"], holes[-1]))
        hole = jnp.stack(holes)[(len(holes) * u[0]).astype(jnp.int32)]
        keep = jnp.where(u[1] < 0.25, hole, ~hole)
        return {"map": _masked(image, keep.astype(jnp.float32))}

    def value(self, stored):
        """Masked RGB and mask, float32 [h, w, 4] in [0, 1]."""
        image = jnp.asarray(stored["image"], jnp.float32) / 255.0
        return {"map": _masked(image, jnp.asarray(stored["keep"], jnp.float32) / 255.0)}

    def parse(self, text, tool=None):
        """`image.png:mask.png` (white is kept), one image with transparency (path or array), or a
        pair of paths or arrays; returns one example."""
        del tool
        if isinstance(text, Mapping) and {"image", "keep"} <= set(text):
            text = (text["image"], text["keep"])
        if isinstance(text, str) and ":" in text and not Path(text).exists():
            text = _split(text)
        if isinstance(text, tuple | list) and len(text) == 2:
            return _pair(*text)
        image = load_rgba(text)
        if image.shape[2] == 3:
            what = f"{text} has" if isinstance(text, str | os.PathLike) else "mask: the image has"
            raise ValueError(f"{what} no transparency; {ALLOWED}")
        return {"image": image[..., :3].copy(), "keep": _binary(image[..., 3])}

    def render(self, stored):
        """What stays, on a checkerboard where the hole is; uint8 [h, w, 3]."""
        image, keep = np.asarray(stored["image"], np.uint8), np.asarray(stored["keep"])
        square = max(1, min(keep.shape) // 16)
        rows, columns = np.indices(keep.shape) // square
        board = np.where((rows + columns) % 2, 205, 155).astype(np.uint8)
        return np.where(keep[..., None] > 127, image, board[..., None])

    def measure(self, wanted, image, tool=None):
        """1 - mean absolute difference of what was to stay, in [0, 1]; nan where nothing was."""
        del tool
        image = load_image(image)
        wanted = self.fit(wanted, image.shape[:2])
        kept = wanted["keep"] > 127
        if not kept.any():
            return float("nan")
        difference = np.abs(image[kept].astype(np.float64) - wanted["image"][kept])
        return float(1.0 - difference.mean() / 255.0)

    def beside(self, rows):
        """The seam: how much larger the mean step between pixels on either side of the hole's
        border is than in the image it was cut from, in grey levels; 0 is perfect."""
        del rows

        def seam(row, image, tool=None) -> float:
            del tool
            image = load_image(image)
            wanted = self.fit(row[self.name], image.shape[:2])
            keep = wanted["keep"] > 127
            steps = [_border_steps(one, keep) for one in (image, wanted["image"])]
            return float(steps[0] - steps[1])

        return {"seam": seam}


def _border_steps(image: np.ndarray, keep: np.ndarray) -> float:
    """The mean absolute difference of neighbours of which one is kept; nan without any."""
    image = image.astype(np.float64)
    steps = [
        np.abs(np.diff(image, axis=axis)).mean(axis=2)[np.diff(keep, axis=axis)] for axis in (0, 1)
    ]
    steps = np.concatenate(steps)
    return float(steps.mean()) if len(steps) else float("nan")


def _masked(image: jax.Array, keep: jax.Array) -> jax.Array:
    keep = keep[..., None]
    return jnp.concatenate([image * keep, keep], axis=-1)


def _boxes(u: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """One to four boxes, bool [H, W], of y [H, 1] and x [1, W] in [0, 1]; `u` is uniform [NUMBERS],
    one draw for a whole hole because each call to a generator costs."""
    middle, half = u[1:9].reshape(4, 2, 1, 1), 0.06 + 0.24 * u[9:17].reshape(4, 2, 1, 1)
    inside = jnp.abs(y[None] - middle[:, 0]) < half[:, 0]
    inside &= jnp.abs(x[None] - middle[:, 1]) < half[:, 1]
    return jnp.any(inside & (jnp.arange(4) <= 4.0 * u[0])[:, None, None], axis=0)


def _strokes(u: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """One to three free strokes of four segments each, as of a brush; bool [H, W]."""
    start, steps = u[1:7].reshape(3, 1, 2), 0.7 * u[7:31].reshape(3, 4, 2) - 0.35
    width = 0.03 + 0.07 * u[31:34].reshape(3, 1, 1, 1)
    points = jnp.clip(jnp.concatenate([start, start + jnp.cumsum(steps, axis=1)], axis=1), 0.0, 1.0)
    a_Sx4x2, step_Sx4x2 = points[:, :-1], points[:, 1:] - points[:, :-1]
    away_y = y[None, None] - a_Sx4x2[..., 0, None, None]
    away_x = x[None, None] - a_Sx4x2[..., 1, None, None]
    step_y, step_x = step_Sx4x2[..., 0, None, None], step_Sx4x2[..., 1, None, None]
    # The nearest point of a segment lies at `along` of its way.
    along = (away_y * step_y + away_x * step_x) / jnp.maximum(step_y**2 + step_x**2, 1e-9)
    along = jnp.clip(along, 0.0, 1.0)
    near = (away_y - along * step_y) ** 2 + (away_x - along * step_x) ** 2 < width**2
    drawn = (jnp.arange(3) <= 3.0 * u[0])[:, None, None]
    return jnp.any(jnp.any(near, axis=1) & drawn, axis=0)


def _instance(u: jax.Array, ids: jax.Array, otherwise: jax.Array) -> jax.Array:
    """One of the instances in ids [H, W], widened; bool [H, W]. `otherwise` where there is none."""
    there = jnp.bincount(ids.ravel(), length=MAX_IDS)[1:] > 0
    chosen = 1 + jnp.argmax(jnp.where(there, u[: MAX_IDS - 1], -1.0))
    window = tuple(2 * (side // 32) + 1 for side in ids.shape)
    inside = (ids == chosen).astype(jnp.float32)
    wide = jax.lax.reduce_window(inside, 0.0, jax.lax.max, window, (1, 1), "SAME") > 0.0
    return jnp.where(jnp.any(there), wide, otherwise)


def _blob(u: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """A wavy round outline, as an object has one; bool [H, W]."""
    middle, size = 0.15 + 0.7 * u[0:2], 0.15 + 0.25 * u[2:4]
    order = jnp.arange(1, 6)[:, None, None]
    wave = (u[4:9].reshape(5, 1, 1) - 0.5) / order
    away_y, away_x = (y - middle[0]) / size[0], (x - middle[1]) / size[1]
    turns = jnp.arctan2(away_y, away_x)[None] * order + 2.0 * jnp.pi * u[9:14].reshape(5, 1, 1)
    outline = jnp.maximum(1.0 + jnp.sum(wave * jnp.cos(turns), axis=0), 0.3)
    return away_y**2 + away_x**2 < outline**2


def _frame(height: int, width: int) -> np.ndarray:
    keep = np.full((height, width), 255, np.uint8)
    keep[height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    return keep


def _binary(keep: np.ndarray) -> np.ndarray:
    """0 or 255, uint8: bool, numbers up to 1, or numbers up to 255."""
    half = 0.5 if keep.dtype == np.bool_ or keep.max(initial=0) <= 1 else 127.5
    return (keep > half).astype(np.uint8) * np.uint8(255)


def _split(text: str) -> tuple[str, str]:
    """`image:mask` where both exist; a name may have colons of its own."""
    cuts = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == ":"]
    for image, mask in cuts:
        if Path(image).is_file() and Path(mask).is_file():
            return image, mask
    return cuts[-1]


def _pair(image, mask) -> dict[str, np.ndarray]:
    image = load_image(image)
    if isinstance(mask, str | os.PathLike):
        keep = _binary(load_image(mask).mean(axis=2) / 255.0)
    else:
        keep = np.asarray(mask)
        keep = _binary(keep.mean(axis=2) if keep.ndim == 3 else keep)
    height, width = image.shape[:2]
    if keep.ndim != 2 or abs(keep.shape[0] * width - keep.shape[1] * height) > max(height, width):
        raise ValueError(
            f"mask: the mask has shape {keep.shape}, the image {(height, width)}; "
            "allowed: the same shape, at any size"
        )
    return {"image": image, "keep": fit_map(keep, (height, width), "nearest")}


register(Mask())
