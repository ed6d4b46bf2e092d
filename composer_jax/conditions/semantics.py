"""Semantics: what an image is about and how it looks as a whole, as CLIP sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, register
from composer_jax.conditions.image import load_array, load_image

WAYS = 100  # candidates of a retrieval
ABOVE, BELOW = (247, 127, 0), (0, 119, 182)  # of a rendered embedding; white is zero


class Semantics(Condition):
    """CLIP's image embedding, of unit length. The tool is a CLIP with `image` and `sizes`."""

    name = "semantics"
    doc = "what the image is about and its style, by CLIP: an image, or an embedding as .npy"
    parts: Mapping[str, Part] = {"vector": Part("vector", ("embed_width",), norm=1.0)}
    feature = Feature(("embed_width",), "float32", "raw")
    tool = "clip"
    reads = ()

    def extract(self, images, given=None, tool=None) -> np.ndarray:
        """float32 [B, E] by the tool. Raises ValueError without one."""
        del given
        return np.asarray(_needed(tool).image(images), np.float32)

    def value(self, stored) -> dict[str, jax.Array]:
        """{"vector": float32 [E], unit length}."""
        return {"vector": jnp.asarray(stored, jnp.float32)}

    def parse(self, text, tool=None) -> np.ndarray:
        """float32 [E] from an image (path or array) or from an embedding (a .npy or array [E]).

        Raises ValueError where an image comes without a CLIP or is a picture that `render` made,
        or an embedding is not this CLIP's.
        """
        is_path = isinstance(text, str | os.PathLike)
        loaded = load_array(text) if is_path and Path(text).suffix.lower() == ".npy" else text
        if isinstance(loaded, np.ndarray) and loaded.ndim == 1:
            return _embedding(loaded, text if is_path else "the array", tool)
        image = load_image(loaded)
        if _is_fingerprint(image):
            raise ValueError(
                f"{text if is_path else 'the image'} is a picture of an embedding, to look at; "
                "give the semantics.npy beside it, or the photo itself"
            )
        return self.extract(image[None], tool=_needed(tool))[0]

    def render(self, stored) -> np.ndarray:
        """A tile a number, orange above and blue below zero: a fingerprint, to compare by eye."""
        vector = np.asarray(stored, np.float64)
        columns = int(np.ceil(np.sqrt(len(vector))))
        rows = -(-len(vector) // columns)
        tiles = np.zeros(rows * columns)
        tiles[: len(vector)] = np.clip(vector * np.sqrt(len(vector)) / 3, -1.0, 1.0)
        colour = np.where(tiles[:, None] > 0, [ABOVE], [BELOW])
        amount = np.abs(tiles)[:, None]
        image = np.rint(colour * amount + 255 * (1 - amount)).astype(np.uint8)
        tile = max(1, 256 // columns)
        return image.reshape(rows, columns, 3).repeat(tile, axis=0).repeat(tile, axis=1)

    def measure(self, wanted, image, tool=None) -> float:
        """The cosine between the wanted embedding and the image's, in [-1, 1]."""
        return float(np.dot(wanted, _needed(tool).image(np.asarray(image)[None])[0]))

    def beside(self, rows):
        """Retrieval: 1 where the image is nearer to the wanted embedding than to 99 others'."""
        others = np.stack([np.asarray(row[self.name], np.float32) for row in rows])

        def top1(row, image, tool=None) -> float:
            found = _needed(tool).image(np.asarray(image)[None])[0]
            wanted = np.asarray(row[self.name], np.float32)
            cosines = (others @ found)[np.any(others != wanted[None], axis=1)][: WAYS - 1]
            return float(np.dot(wanted, found) > cosines.max(initial=-1.0))

        return {f"retrieval, {WAYS} ways": top1}


def _is_fingerprint(image: np.ndarray) -> bool:
    """Whether `render` made an image: all of it lies between white and its two colours, both are
    there, and tiles fill it."""
    away = []
    for colour, strongest in ((ABOVE, 2), (BELOW, 0)):
        amount = 1.0 - image[..., strongest] / 255.0
        expected = 255.0 + amount[..., None] * (np.float64(colour) - 255.0)
        away.append(np.abs(expected - image).max(axis=2))
    coloured = image.min(axis=2) < 230
    both = all(np.any(coloured & (one <= 1.5)) for one in away)
    return bool(both and np.minimum(*away).max() <= 1.5)


def _embedding(vector: np.ndarray, what, tool) -> np.ndarray:
    if vector.dtype.kind not in "fiu" or not np.all(np.isfinite(vector)) or not np.any(vector):
        raise ValueError(f"{what} is no embedding: finite numbers, not all zero, are wanted")
    if tool is not None and len(vector) != tool.sizes["embed_width"]:
        raise ValueError(
            f"{what} has {len(vector)} numbers; this CLIP's embeddings have "
            f"{tool.sizes['embed_width']}"
        )
    length = np.linalg.norm(vector.astype(np.float64))
    if abs(length - 1.0) < 1e-6:  # as stored: dividing would change last bits
        return vector.astype(np.float32)
    return (vector / length).astype(np.float32)


def _needed(tool):
    if tool is None:
        raise ValueError("semantics needs a CLIP passed as tool (a directory or a hub name)")
    return tool


register(Semantics())
