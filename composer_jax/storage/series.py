"""A folder of numbered images that grows: what is there of the same call is not made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from composer_jax.models.files import read_json
from composer_jax.storage.models import Model
from composer_jax.utils.atomic import write_json

CALL = "call.json"


class Series:
    """Images OUT/0000.png, 0001.png, ... of one call. `first`: the first that is missing.

    `call`: everything but the count that decides what the images are, as JSON's types; written to
    OUT/call.json. Raises ValueError, naming what differs, where OUT holds images of another call.
    """

    def __init__(self, out: Path, call: Mapping[str, Any]):
        self.out = out
        call = json.loads(json.dumps(call))
        if (out / CALL).is_file():
            old = read_json(out / CALL)
            for key in sorted(call.keys() | old.keys()):
                if call.get(key) != old.get(key):
                    raise ValueError(f"{out} holds images of another {key}; give another --out")
        elif self.path(0).exists():
            raise ValueError(f"{out} holds images of another call; give another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / CALL, call)
        self.first = 0
        while self.path(self.first).exists():
            self.first += 1

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.out / f"{index:04d}.png"

    def add(self, index: int, image: np.ndarray) -> None:
        """Writes image `index`, uint8 [H, W, 3], in one move."""
        new = self.path(index).with_suffix(".new")
        with new.open("wb") as file:
            Image.fromarray(image).save(file, "PNG")
        os.replace(new, self.path(index))

    def images(self, count: int) -> np.ndarray:
        """The first `count` images, uint8 [count, H, W, 3]."""
        return np.stack([np.asarray(Image.open(self.path(i))) for i in range(count)])


def describe_model(model: Model) -> str:
    """A digest of a model directory: of its model.json and its tensors' names and checksums."""
    folder, digest = model.clip.parent, hashlib.sha256()
    for path in (folder / "model.json", folder / "unet.safetensors"):
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def describe_uses(uses: Mapping[str, Sequence[Any]]) -> dict[str, list]:
    """Uses of conditions as JSON's types; arrays as digests."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        array = np.asarray(value)
        return hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest()[:16]

    def one(use: Any) -> dict[str, Any]:
        fields = {key: value for key, value in vars(use).items() if key != "value"}
        leaves, tree = jax.tree.flatten(use.value)
        return jax.tree.map(plain, fields, is_leaf=lambda a: a is None) | {
            "value": [str(tree), *map(plain, leaves)]
        }

    return {name: [one(use) for use in candidates] for name, candidates in uses.items()}
