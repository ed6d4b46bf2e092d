"""A folder of numbered images that grows: what is there of the same call is not made again."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from PIL import Image

from composer_jax.storage.models import Model
from composer_jax.utils.claims import Claim
from composer_jax.utils.png import png_fault, png_tag, save_png

log = logging.getLogger("composer_jax")
CALL = "call.json"
RESULT = re.compile(r"\d{4,}\.png")
MORE = ("grid.png", "report.html", "previews")  # what commands add


class Series:
    """Images OUT/0000.png, 0001.png, ... of one call, and what is made of them (`MORE`).

    `call`: everything but the count that decides what the images are, as JSON's types; written to
    OUT/call.json with the first image; `former`: what keys mean that it may be older than. Raises
    as `utils.claims.Claim` does.
    """

    def __init__(
        self, out: Path, call: Mapping[str, Any], former: Mapping[str, Any] = MappingProxyType({})
    ):
        self.out = out
        there = sorted(path for path in out.glob("*.png") if RESULT.fullmatch(path.name))
        self._claim = Claim(
            out, CALL, call, results=there, tag_of=png_tag, more=MORE, former=former
        )

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.out / f"{index:04d}.png"

    def missing(self, count: int) -> list[range]:
        """Which of the first `count` images are not there, or damaged, which is logged."""
        ranges: list[range] = []
        for index in range(count):
            path = self.path(index)
            if path.exists():
                fault = png_fault(path)
                if fault is None:
                    continue
                log.warning("%s is damaged (%s); it is made again", path, fault)
            if ranges and ranges[-1].stop == index:
                ranges[-1] = range(ranges[-1].start, index + 1)
            else:
                ranges.append(range(index, index + 1))
        return ranges

    def begin(self) -> None:
        """Says in the folder of which call it is, before anything else is written; raises
        `WriteError`."""
        self._claim.write()

    def add(self, index: int, image: np.ndarray) -> None:
        """Writes image `index`, uint8 [H, W, 3], in one move; raises `WriteError`."""
        self.begin()
        save_png(self.path(index), image, self._claim.tag)

    def images(self, count: int) -> np.ndarray:
        """The first `count` images, uint8 [count, H, W, 3]; raises ValueError for one of another
        size."""
        found: list[np.ndarray] = []
        for index in range(count):
            found.append(np.asarray(Image.open(self.path(index)).convert("RGB")))
            if found[-1].shape != found[0].shape:
                raise ValueError(
                    f"{self.path(index)} is of another size than {self.path(0).name}: it was not "
                    "made by this call; move it away"
                )
        return np.stack(found)


def describe_model(model: Model) -> str:
    """A digest of a model directory: of its model.json and its tensors' names and checksums."""
    folder, digest = model.clip.parent, hashlib.sha256()
    for path in (folder / "model.json", folder / "unet.safetensors"):
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def describe(value: Any) -> Any:
    """A plain value as it is, an array as a digest, the text of a file's path as its contents'."""
    if isinstance(value, str | os.PathLike) and os.path.isfile(value):
        value = np.fromfile(value, np.uint8)
    if isinstance(value, os.PathLike):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    array = np.asarray(value)
    return hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest()[:16]


def describe_uses(uses: Mapping[str, Sequence[Any]]) -> dict[str, list]:
    """Uses of conditions as JSON's types; arrays as digests."""

    def one(use: Any) -> dict[str, Any]:
        fields = {key: value for key, value in vars(use).items() if key != "value"}
        leaves, tree = jax.tree.flatten(use.value)
        return jax.tree.map(describe, fields, is_leaf=lambda a: a is None) | {
            "value": [str(tree), *map(describe, leaves)]
        }

    return {name: [one(use) for use in candidates] for name, candidates in uses.items()}
