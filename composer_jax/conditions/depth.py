"""Depth: how near every point is, relative to the rest of the image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, register
from composer_jax.conditions.image import fit_map, load_image
from composer_jax.conditions.maps import grey, load_map, run_tool

_NEAR = 65535
_NETWORK = "the depth network"
_FLAT = 1e-4  # relative spread under which a map says nothing but "all at one distance"
_TOOL = "a depth network passed as tool (--depth-weights, config key tools.depth)"
_SOURCES = f"a depth map given by the source, a depth image by hand, or {_TOOL}"


class Depth(Condition):
    """Relative inverse depth in [0, 1]: 1 is the nearest point, 0 the farthest or the sky.

    The tool is a depth network: uint8 [B, H, W, 3] -> relative inverse depth, float [B, H, W],
    near = large, of any scale and offset.
    """

    name = "depth"
    doc = "how near every point is: a grey image, near is white (8 or 16 bits), or a .npy"
    switches: Mapping[str, str] = MappingProxyType(
        {"invert": "the map is of distance: far is white"}
    )
    parts: Mapping[str, Part] = {"map": Part("spatial", (1,))}
    feature = Feature(("h", "w"), "uint16", "png", resize="area")
    tool = "depth"
    reads = ("depth", "distance")

    def extract(self, images, given=None, tool=None) -> np.ndarray:
        """uint16 [B, H, W] from `given["depth"]` (nearness, as `parse` takes it), or from
        `given["distance"]` (larger = farther; inf, and what is not positive, is sky), else by the
        tool. Raises ValueError where there is none."""
        known = given or {}
        if known.get("depth") is not None:
            return np.stack([_normalise(np.asarray(d), "the depth map") for d in known["depth"]])
        if known.get("distance") is not None:
            return np.stack([_from_distance(distance) for distance in known["distance"]])
        if tool is None:
            raise ValueError(f"depth needs {_SOURCES}")
        return np.stack([_normalise(one, _NETWORK) for one in run_tool(tool, images, _NETWORK)])

    def value(self, stored) -> dict[str, jax.Array]:
        """{"map": float32 [h, w, 1] in [0, 1]}."""
        return {"map": jnp.asarray(stored, jnp.float32)[..., None] / _NEAR}

    def parse(self, text, tool=None, *, invert: bool = False) -> np.ndarray:
        """uint16 [H, W] from a grey image (near is white) or an array [H, W] of relative inverse
        depth, stretched to the full range; what is transparent is far. An image in colour goes
        through the tool.

        `invert`: large is far. Shades (8 bits, floats within [0, 1], whole numbers that reach
        65535) are turned around; other numbers are distances d, of which 1 / d is taken, and what
        is not finite and positive (nothing was measured) is far.

        Raises ValueError where it is in colour and there is no tool, or is no map of numbers.
        """
        loaded = load_map(text)
        what = text if isinstance(text, str | os.PathLike) else "the depth map"
        shades = grey(loaded)
        if shades is not None:
            solid = np.True_
            if loaded.ndim == 3 and loaded.shape[2] in (2, 4):
                solid = 2.0 * loaded[..., -1] >= _white(loaded[..., -1])
            if invert:
                return _turned(shades, what, solid)
            return _normalise(shades, what, solid)
        if invert:
            raise ValueError(f"{what} is no map of distance, in grey, which invert is for")
        if loaded.ndim != 3 or loaded.shape[2] not in (3, 4):
            raise ValueError(f"{what} has shape {loaded.shape}; a depth map is [H, W]")
        if tool is None:
            raise ValueError(f"{what} is in colour; depth needs {_SOURCES}")
        image = load_image(text)
        return self.extract(image[None], tool=tool)[0]

    def render(self, stored) -> np.ndarray:
        """Grey, uint8 [H, W, 3]."""
        grey_HxWx1 = ((np.asarray(stored, np.uint32) + 128) // 257).astype(np.uint8)[..., None]
        return np.repeat(grey_HxWx1, 3, axis=2)

    def to_png(self, stored) -> np.ndarray:
        """Grey of 16 bits, uint16 [H, W], which `parse` reads back exactly."""
        return np.asarray(stored, np.uint16)

    def measure(self, wanted, image, tool=None) -> float:
        """Spearman's correlation between `wanted` and what the tool sees in the image, in [-1, 1].

        Of two flat maps 1, of one 0. Raises ValueError without a tool.
        """
        if tool is None:
            raise ValueError(f"measuring depth needs {_TOOL}")
        wanted = np.asarray(wanted, np.float64)
        found = np.asarray(run_tool(tool, image[None], _NETWORK)[0], np.float64)
        found = fit_map(found, wanted.shape, "area")
        return spearman(wanted, found)

    def judge(self, stored: Sequence[np.ndarray]):
        """Spearman's correlation after the set's mean map is taken away from both.

        The floor is near and the sky far in every scene: the mean map alone correlates with each.
        """
        return self._beyond_the_mean(stored)

    def beside(self, rows):
        """The same on the pixels of instances alone; nan where these are not known."""
        measure = self._beyond_the_mean([row[self.name] for row in rows])

        def on_instances(row, image, tool=None) -> float:
            ids = np.asarray(row["instances"]["ids"] if "instances" in row else 0)
            return measure(row[self.name], image, tool, ids > 0) if ids.any() else float("nan")

        return {"on instances": on_instances}

    def _beyond_the_mean(self, stored: Sequence[np.ndarray]):
        mean = np.mean([np.asarray(one, np.float64) for one in stored], axis=0)

        def measure(wanted, image, tool=None, where=np.s_[:]) -> float:
            found = self.extract(np.asarray(image)[None], tool=tool)[0]
            found = fit_map(found.astype(np.float64), mean.shape, "area")
            return spearman((np.asarray(wanted, np.float64) - mean)[where], (found - mean)[where])

        return measure


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays of one shape, ties by their mean rank.

    Where both are constant 1, where one is 0.
    """
    from scipy.stats import rankdata

    flat = [bool(np.ptp(values) <= _FLAT * np.abs(values).max()) for values in (a, b)]
    if any(flat):
        return float(all(flat))
    ranks = [rankdata(values.ravel()) for values in (a, b)]
    return float(np.clip(np.corrcoef(*ranks)[0, 1], -1.0, 1.0))


def _from_distance(distance, what="the depth map", solid=np.True_) -> np.ndarray:
    distance = np.asarray(distance)
    if distance.dtype.kind not in "biuf":
        raise ValueError(f"{what} holds {distance.dtype}, not numbers")
    distance = distance.astype(np.float64)
    there = np.isfinite(distance) & (distance > 0)
    inverse = 1.0 / np.maximum(np.where(there, distance, 1.0), 1e-300)
    return _normalise(np.where(there, inverse, 0.0), what, solid)


def _turned(far: np.ndarray, what, solid) -> np.ndarray:
    """Of shades that are white where it is far, or of distances."""
    top = _white(far)
    if top == 1.0 or (far.dtype.kind in "ui" and (top == 255.0 or far.max() == top)):
        return _normalise(top - far.astype(np.float64), what, solid)
    return _from_distance(far, what, solid)


def _white(array: np.ndarray) -> float:
    """The largest value of an image of that kind: the least usual one that holds its numbers."""
    high = array.max(initial=0)
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and high <= 1.0):
        return 1.0
    return 255.0 if high <= 255 else 65535.0


def _normalise(inverse: np.ndarray, what, solid=np.True_) -> np.ndarray:
    """Any scale and offset to 0 .. 65535; a flat map is near all over, a black one far, and so is
    what is not `solid`."""
    if inverse.dtype.kind not in "biuf":
        raise ValueError(f"{what} holds {inverse.dtype}, not numbers")
    inverse = inverse.astype(np.float64)
    if inverse.ndim != 2 or not inverse.size:
        raise ValueError(f"{what} has shape {inverse.shape}; a depth map is [H, W]")
    if not np.all(np.isfinite(inverse)):
        raise ValueError(f"{what} holds values that are not finite; near is large, the sky 0")
    solid = np.broadcast_to(solid, inverse.shape)
    low, high = inverse.min(where=solid, initial=np.inf), inverse.max(where=solid, initial=-np.inf)
    if high - low <= _FLAT * max(abs(low), abs(high)) or not solid.any():
        return np.where(solid & (inverse > 0), _NEAR, 0).astype(np.uint16)
    scaled = np.rint((inverse - low) / (high - low) * _NEAR)
    return np.where(solid, scaled, 0).astype(np.uint16)


register(Depth())
