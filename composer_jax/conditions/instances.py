"""Instances: which pixels belong to which thing, and what kind of thing each is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, register
from composer_jax.conditions.blends import without_blends
from composer_jax.conditions.image import fit_map, load_image
from composer_jax.conditions.maps import MAX_IDS, load_map, renumber, run_tool
from composer_jax.conditions.segmenter import OnnxSegmenter

__all__ = ["CLASS_COLOURS", "Instances", "OnnxSegmenter", "class_colours", "mean_iou"]

JITTER = 0.08  # how far an instance's colour may lie from its class's, per channel
_TOOL = "a segmenter passed as tool (--segmenter, config key tools.segmenter)"
_SOURCES = f"an id map or masks given by the source, an id map by hand, or {_TOOL}"


def class_colours() -> np.ndarray:
    """A colour per class, float32 [32, 3]; 0, nearly white, is of the unknown.

    Every other point of a 4 x 4 x 4 lattice, each next one the farthest from all before it. Two lie
    at least 0.26 apart in some channel and none at an end of the range, so that jitters never meet.
    """
    lattice = np.array([p for p in np.ndindex(4, 4, 4) if sum(p) % 2])[::-1]
    order = [0]
    while len(order) < len(lattice):
        away = np.sum((lattice[:, None] - lattice[order][None]) ** 2, axis=-1).min(axis=1)
        order.append(int(away.argmax()))
    return (0.1 + 0.8 / 3 * lattice[order]).astype(np.float32)


CLASS_COLOURS = class_colours()


class Instances(Condition):
    """A colour map: each instance in its class's colour with a jitter of its own, on black.

    The tool is a segmenter: uint8 [B, H, W, 3] -> ids, int [B, H, W], 0 is the background.
    """

    name = "instances"
    doc = "which pixels belong to which thing: an id map (grey levels or colours, 0 is nothing)"
    parts: Mapping[str, Part] = {"map": Part("spatial", (3,))}
    feature: Mapping[str, Feature] = {
        "ids": Feature(("h", "w"), "uint8", "png", resize="nearest"),
        "classes": Feature((MAX_IDS,), "int32", "raw"),
    }
    tool = "segmenter"
    reads = ("instances", "masks", "classes")

    def extract(self, images, given=None, tool=None) -> dict[str, np.ndarray]:
        """{"ids": uint8 [B, H, W], "classes": int32 [B, 32]}, class 0 unknown.

        From `given["instances"]` (ids [B, H, W]) or `given["masks"]` (B arrays [N, H, W], the
        later ones on top, ids from 1), with `given["classes"]` ([B, n], one per id, entry 0 unused)
        where known; else by the tool. Of more than 31 instances the largest stay. Raises
        ValueError where there is nothing to take them from.
        """
        given = given or {}
        maps = given.get("instances")
        if maps is None and given.get("masks") is not None:
            maps = [_ids_from_masks(np.asarray(masks)) for masks in given["masks"]]
        classes = given.get("classes") if maps is not None else None
        if maps is None:
            if tool is None:
                raise ValueError(f"instances needs {_SOURCES}")
            maps = run_tool(tool, images, "the segmenter")
        classes = [None] * len(maps) if classes is None else classes
        results = [_compact(*pair) for pair in zip(maps, classes, strict=True)]
        return {name: np.stack([result[name] for result in results]) for name in self.feature}

    def draw(self, key, stored, image) -> dict[str, jax.Array]:
        """As `value`, the jitter drawn: uniform within +-0.08 per instance and channel."""
        del image
        jitter_Nx3 = jax.random.uniform(key, (MAX_IDS, 3), minval=-JITTER, maxval=JITTER)
        return {"map": _colour(stored, jitter_Nx3)}

    def value(self, stored) -> dict[str, jax.Array]:
        """{"map": float32 [h, w, 3] in [0, 1]}, background 0; an id always has the same jitter."""
        return {"map": _colour(stored, jnp.asarray(_fixed_jitter()))}

    def parse(self, text, tool=None) -> dict[str, np.ndarray]:
        """{"ids", "classes"} of one example from a map: black or transparent is the background.

        Grey levels up to 31 are ids as they stand; other grey levels, and colours, are numbered in
        order; a picture that `render` made gives back its ids and classes. Arrays and .npy: ids
        [H, W] or masks bool [N, H, W], or a stored example. With a tool, a photo is segmented.
        Blends along borders, which smoothing makes, become the colours beside them, and the log
        says so.

        Raises ValueError where a map has more than 31 different values and there is no tool.
        """
        stored = self.unpacked(text)
        if stored is not None:
            return stored
        loaded = load_map(text)
        what = text if isinstance(text, str | os.PathLike) else "the id map"
        if loaded.dtype == np.bool_ and loaded.size:
            if loaded.ndim != 3 or not loaded.shape[2] <= 4 < loaded.shape[1]:
                return _compact(_ids_from_masks(loaded if loaded.ndim == 3 else loaded[None]))
            loaded = loaded.astype(np.uint8) * np.uint8(255)  # an image, no masks 4 pixels wide
        levels, coloured = _levels(loaded, what)
        levels = without_blends(levels, coloured, what)
        distinct = np.unique(levels[levels > 0])
        if len(distinct) < MAX_IDS:
            return _from_levels(levels, distinct, coloured)
        if tool is not None:
            return self._segment(text, tool)
        raise ValueError(
            f"{what} has {len(distinct)} different colours, an id map at most {MAX_IDS - 1} "
            f"beside black; instances needs {_SOURCES}"
        )

    def _segment(self, source, tool) -> dict[str, np.ndarray]:
        stored = self.extract(load_image(source)[None], tool=tool)
        return {name: array[0] for name, array in stored.items()}

    def checked(self, stored, sizes=MappingProxyType({})):
        """As of any condition; raises ValueError for ids beyond 31, too."""
        stored = super().checked(stored, sizes)
        if stored["ids"].max() >= MAX_IDS:
            raise ValueError(f"instances' ids reach {stored['ids'].max()}; at most {MAX_IDS - 1}")
        return stored

    def render(self, stored) -> np.ndarray:
        """The colours of `value`, uint8 [H, W, 3]; `parse` reads ids and classes back."""
        table = np.rint(_table_for(np.asarray(stored["classes"])) * 255).astype(np.uint8)
        return table[np.asarray(stored["ids"])]

    def measure(self, wanted, image, tool=None) -> float:
        """Mean IoU of the wanted instances with the segmenter's, matched one to one (Hungarian).

        An instance without a partner counts 0; where nothing is wanted, finding nothing is 1.
        Raises ValueError without a tool.
        """
        if tool is None:
            raise ValueError(f"measuring instances needs {_TOOL}")
        ids = np.asarray(wanted["ids"])
        found = _compact(run_tool(tool, image[None], "the segmenter")[0])["ids"]
        return mean_iou(ids, fit_map(found, ids.shape, "nearest"))


def mean_iou(wanted: np.ndarray, found: np.ndarray) -> float:
    """Mean over the ids > 0 of `wanted` [H, W] of the IoU with the id of `found` matched to it.

    The matching maximises the sum; the unmatched count 0. Nothing wanted: 1 if nothing is found.
    """
    from scipy.optimize import linear_sum_assignment

    overlap = np.zeros((MAX_IDS, MAX_IDS))
    np.add.at(overlap, (wanted.ravel(), found.ravel()), 1.0)
    union = overlap.sum(axis=1)[:, None] + overlap.sum(axis=0)[None] - overlap
    iou = (overlap / np.maximum(union, 1.0))[1:, 1:]
    count = np.count_nonzero(overlap.sum(axis=1)[1:])
    if not count:
        return float(not found.any())
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / count)


def _compact(ids, classes=None) -> dict[str, np.ndarray]:
    """Any id map as stored: ids that fit stay, else the 31 largest instances are numbered anew."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "biu" or (ids.size and ids.min() < 0):
        raise ValueError(
            f"an id map is [H, W] of whole numbers from 0, not {ids.dtype} {list(ids.shape)}"
        )
    known = np.zeros(0, np.int32) if classes is None else np.asarray(classes, np.int32)
    kept = np.arange(MAX_IDS)
    if ids.max(initial=0) >= MAX_IDS:
        values, counts = np.unique(ids[ids > 0], return_counts=True)
        values = values[np.argsort(-counts, kind="stable")][: MAX_IDS - 1]
        kept = np.concatenate([[0], values]).astype(np.int64)
        ids = renumber(ids, np.sort(values), 1 + np.argsort(values))
    table = np.zeros(MAX_IDS, np.int32)
    there = kept < len(known)
    table[np.flatnonzero(there)] = known[kept[there]]
    table[0] = 0
    return {"ids": ids.astype(np.uint8), "classes": table}


def _ids_from_masks(masks: np.ndarray) -> np.ndarray:
    if masks.ndim != 3:
        raise ValueError(f"masks are [N, H, W], not {list(masks.shape)}")
    ids = np.zeros(masks.shape[1:], np.int64)
    for i, mask in enumerate(masks):
        ids[mask > 0] = i + 1
    return ids


def _levels(image: np.ndarray, what) -> tuple[np.ndarray, bool]:
    """A whole number per pixel, int64 [H, W], 0 where black or transparent; and: is it a colour?"""
    shape, dtype = image.shape, image.dtype
    image = image[..., None] if image.ndim == 2 else image
    channels = image.shape[2] if image.ndim == 3 and image.size else 0
    known = dtype.kind in "iu" if channels == 1 else dtype in (np.uint8, np.uint16)
    if not (known and 1 <= channels <= 4 and image.min() >= 0):
        raise ValueError(
            f"{what} is {dtype} {list(shape)}; allowed: whole numbers from 0 [H, W], "
            "bool masks [N, H, W] or an image"
        )
    rgb = image[..., : 3 if channels > 2 else 1].astype(np.int64)
    coloured = bool(np.any(rgb != rgb[..., :1]))  # exactly grey: ids may differ by one level
    if coloured:
        rgb >>= 8 * dtype.itemsize - 8
    levels = rgb @ [1 << 16, 1 << 8, 1] if coloured else rgb[..., 0]
    if channels in (2, 4):
        levels = np.where(image[..., -1] > np.iinfo(dtype).max // 2, levels, 0)
    return levels, coloured


def _from_levels(levels: np.ndarray, distinct: np.ndarray, coloured: bool) -> dict[str, np.ndarray]:
    """Fewer than 32 `distinct` levels as stored: rendered colours decoded, small ids kept."""
    known = [_rendered()[level] for level in distinct if level in _rendered()] if coloured else []
    ids = [instance for instance, _ in known]
    if known and len(distinct) == len(known) == len(set(ids)):
        classes = np.zeros(MAX_IDS, np.int32)
        classes[ids] = [kind for _, kind in known]
        return _compact(renumber(levels, distinct, ids), classes)
    if not coloured and distinct.max(initial=0) < MAX_IDS:
        return _compact(levels)
    return _compact(renumber(levels, distinct, range(1, len(distinct) + 1)))


@jax.jit
def _colour(stored, jitter_Nx3: jax.Array) -> jax.Array:
    classes_N = _wrap(jnp.asarray(stored["classes"]))
    table_Nx3 = jnp.asarray(CLASS_COLOURS)[classes_N] + jitter_Nx3
    ids_hxwx1 = jnp.asarray(stored["ids"])[..., None]
    # A choice for each id is one pass over the map. Looked up, colours of three channels fill
    # 128 lanes of a TPU: 1.4 ms for 4 maps of 512 px on v5p instead of 0.03; on CPU it is a third.
    colour_hxwx3 = jnp.zeros((*ids_hxwx1.shape[:-1], 3))
    for i in range(1, MAX_IDS):
        colour_hxwx3 = jnp.where(ids_hxwx1 == i, table_Nx3[i], colour_hxwx3)
    return colour_hxwx3


def _wrap(classes):
    """Beyond the 31 known classes colours repeat; 0 and less stay unknown."""
    return (classes > 0) * ((classes - 1) % (len(CLASS_COLOURS) - 1) + 1)


def _fixed_jitter() -> np.ndarray:
    """A jitter per id, [32, 3], spread evenly (the R3 sequence: powers of 1 / 1.2207)."""
    steps = np.float64(1.0) / 1.22074408460575947536 ** np.arange(1, 4)
    points = (0.5 + np.arange(MAX_IDS)[:, None] * steps[None]) % 1.0
    return ((2.0 * points - 1.0) * JITTER).astype(np.float32)


def _table_for(classes: np.ndarray) -> np.ndarray:
    table = CLASS_COLOURS[_wrap(classes)] + _fixed_jitter()
    table[0] = 0.0
    return table


@cache
def _rendered() -> dict[int, tuple[int, int]]:
    """24-bit colour -> (id, class) of every colour that `render` uses."""
    colours = {}
    for kind in range(len(CLASS_COLOURS)):
        table = np.rint(_table_for(np.full(MAX_IDS, kind)) * 255).astype(int)
        for i, (red, green, blue) in enumerate(table[1:].tolist(), start=1):
            colours[red << 16 | green << 8 | blue] = (i, kind)
    return colours


register(Instances())
