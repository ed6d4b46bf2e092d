"""Mask: the part of an image that stays; the rest is a hole to be filled."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, meant, register
from composer_jax.conditions.features import unpacked
from composer_jax.conditions.image import fit_map, load_image, load_region, load_rgba
from composer_jax.conditions.maps import MAX_IDS
from composer_jax.utils.painted import painted

log = logging.getLogger("composer_jax")

ALLOWED = (
    "allowed: IMAGE:region=PNG (white is filled anew, as in every region), or one image with "
    "transparency (that is the hole)"
)
OLD = (
    "mask: in IMAGE:MASK white stays; write IMAGE:region=PNG, where white is filled anew, as in "
    "every other region"
)
NUMBERS = 34  # uniform numbers that the largest kind of hole takes


class Mask(Condition):
    """The masked image and its mask (1 = keep), as four channels (Composer, 3.1)."""

    name = "mask"
    doc = (
        "what stays of an image, as IMAGE:region=PNG (white is filled anew) or one image with "
        "transparency (filled anew)"
    )
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
            keep = np.stack([_binary(one) for one in np.asarray(given_keep)])
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
        """`image.png:region=hole.png`, or a dict of "image" and "region" (paths or arrays), white
        where the image is filled anew, as in every region; or one image with transparency, which is
        the hole (path or array); or a dict of "image" and "keep", or a stored example, 1 where the
        image stays; returns one example.

        `image.png:mask.png`, or a pair, the older form in which white stays, is read with a warning
        in the log. What is transparent in a region or mask is not painted white.
        """
        del tool
        if isinstance(text, str) and ":" in text and not os.path.exists(text):
            source = _split(text)
        elif isinstance(text, tuple | list) and len(text) == 2:
            source = {"image": text[0], "mask": text[1]}
        else:
            source = unpacked(text)
        if source is not None:
            return _read(source)
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

    def to_png(self, stored):
        """The image, uint8 [h, w, 4], transparent where the hole is, which `parse` reads back."""
        keep = np.asarray(stored["keep"], np.uint8)
        return np.dstack([np.asarray(stored["image"], np.uint8), keep])

    def fit(self, stored, size):
        """Crops and resizes as of any condition; no colour comes into what stays from the hole."""
        fitted = super().fit(stored, size)
        kept = np.asarray(stored["keep"]) > 127
        if kept.shape == tuple(size) or kept.all() or not kept.any():
            return fitted
        from scipy.ndimage import distance_transform_edt

        nearest = distance_transform_edt(~kept, return_distances=False, return_indices=True)
        filled = super().fit({**stored, "image": np.asarray(stored["image"])[tuple(nearest)]}, size)
        stays = fitted["keep"][..., None] > 127
        return {**fitted, "image": np.where(stays, filled["image"], fitted["image"])}

    def checked(self, stored, sizes=MappingProxyType({})):
        """As of any condition; `keep` may be bool, or numbers from 0 to 1, too."""
        return super().checked(_read(stored), sizes)

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


def _binary(keep) -> np.ndarray:
    """0 or 255, uint8 [H, W], of an array as `painted` reads it."""
    keep = np.asarray(keep)
    keep = keep[..., None] if keep.ndim == 2 else keep  # an image: numbers up to 255 are allowed
    return (painted(keep, "mask: the mask") > 0.5).astype(np.uint8) * np.uint8(255)


def _split(text: str) -> dict[str, str]:
    """`image:region=hole`, or `image:mask` where both exist; a name may have colons of its own."""
    cuts = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == ":"]
    for image, rest in cuts:
        key, equals, path = rest.partition("=")
        if key == "region" and equals:
            return {"image": image, "region": path}
        if os.path.isfile(image) and os.path.isfile(rest):
            return {"image": image, "mask": rest}
    image, rest = cuts[-1]
    key, equals, _ = rest.partition("=")
    if equals and re.fullmatch("[a-z]+", key):
        raise ValueError(f"mask: no {key!r} of an image{meant(key, ('region',))}; {ALLOWED}")
    return {"image": image, "mask": rest}


def _read(source: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One example; a word about the older form comes once it is read."""
    pair = _pair(**_named(source))
    if "mask" in source:
        log.warning(OLD)
    return pair


def _named(source: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `_pair`."""
    source = dict(source)
    if "mask" in source:
        source["keep"] = source.pop("mask")
    if set(source) not in ({"image", "keep"}, {"image", "region"}):
        raise ValueError(
            f"mask: {', '.join(map(str, source)) or 'nothing'} is given; image and region (white "
            "is filled anew) or image and keep (white stays) are wanted"
        )
    return source


def _pair(image, *, keep=None, region=None) -> dict[str, np.ndarray]:
    """An image and what stays of it, or what is filled anew; paths or arrays."""
    image = load_image(image)
    drawn = keep if region is None else region
    drawn = _binary(load_region(drawn) if isinstance(drawn, str | os.PathLike) else drawn)
    height, width = image.shape[:2]
    if abs(drawn.shape[0] * width - drawn.shape[1] * height) > max(height, width):
        raise ValueError(
            f"mask: the mask has shape {drawn.shape}, the image {(height, width)}; "
            "allowed: the same shape, at any size"
        )
    drawn = fit_map(drawn, (height, width), "nearest")
    return {"image": image, "keep": drawn if region is None else np.uint8(255) - drawn}


register(Mask())
