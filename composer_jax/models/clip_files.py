"""CLIP on disk: its directory, its weights in both layouts, and how it wants its images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from PIL import Image

from composer_jax.models.clip_tokenizer import FILES, SETTINGS
from composer_jax.models.files import (
    Tensor,
    Tensors,
    compare,
    in_memory,
    member,
    on_device,
    open_tensors,
    read_json,
    write_tensors,
)
from composer_jax.models.hub import find_folder
from composer_jax.models.peers import from_peer, to_peer
from composer_jax.models.weight_files import choose_weights, find_weights, lacking_weights

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# all but the weights
SMALL = ("config.json", *sum(FILES, ()), *SETTINGS, "added_tokens.json", *PREPROCESSORS)
MSGPACK = "flax_model.msgpack"
BUFFERS = r".*\.position_ids"  # stored by old releases, 0, 1, 2, ...
MAX_PIXELS = 2**24  # of a resized image, before it is cropped
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def find_clip(source) -> Path:
    """The directory of a CLIP: `source` itself, or what the hub (or its cache) has under that name.

    Raises ValueError, one line, where there is neither, or where a file is missing from it or
    leads out of it.
    """
    if Path(source).is_dir():
        _find_params(Path(source))  # tells what to do with a pickle
    return find_folder(source, "CLIP", _choose, _missing)


def _choose(files: set[str]) -> list[str]:
    weights = choose_weights(files, "model") or sorted(files & {MSGPACK})
    return sorted({*files & set(SMALL), *weights})


def _missing(folder: Path) -> str:
    there = {name for name in SMALL if member(folder, name).is_file()}
    missing = [] if "config.json" in there else ["config.json"]
    if not any(there.issuperset(files) for files in FILES):
        missing += [name for name in FILES[0] if name not in there]
    if not member(folder, MSGPACK).is_file() and (lacks := lacking_weights(folder, "model")):
        missing.append(lacks if lacks != "model.safetensors" else f"{lacks} or {MSGPACK}")
    return ", ".join(missing)


def _find_params(folder: Path) -> Path:
    try:
        return find_weights(folder, "model")
    except ValueError:
        if member(folder, MSGPACK).is_file():
            return folder / MSGPACK
        raise


def open_params(folder: Path, wanted: Tensors) -> dict[str, Tensor]:
    """The parameters that `wanted` names (dotted paths), under our names and in our axes, unread.

    safetensors hold PyTorch's layout (as on the hub) or Flax's; msgpack holds Flax's. Raises
    ValueError naming the first tensor that is missing, surplus, or of another shape.
    """
    path = _find_params(folder)
    tensors = _unpack(path) if path.name == MSGPACK else open_tensors(path, folder)
    if any(name.endswith(".kernel") for name in tensors):
        compare({name: tensor.shape for name, tensor in wanted.items()}, tensors, str(path))
        return {name: tensors[name] for name in wanted}
    return from_peer(wanted, tensors, str(path), ignore=BUFFERS)


def read_params(folder: Path, wanted: Tensors) -> dict[str, Any]:
    """The same in memory, nested, as float32; raises ValueError for broken numbers, too."""
    arrays = {
        tuple(name.split(".")): on_device(tensor, np.float32)
        for name, tensor in open_params(folder, wanted).items()
    }
    return traverse_util.unflatten_dict(arrays)


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` in the layout that PyTorch's and Flax's CLIP both load."""
    flat = traverse_util.flatten_dict(dict(params), sep=".")
    tensors = {name: in_memory(array) for name, array in flat.items()}
    write_tensors(folder / "model.safetensors", to_peer(tensors))


def _unpack(path: Path) -> Tensors:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = traverse_util.flatten_dict(tree, sep=".")
        return {name: in_memory(array) for name, array in flat.items()}
    except Exception as error:  # whatever a broken file makes of itself in there
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Preprocess:
    """What CLIPImageProcessor does to a uint8 image: resize, centre crop, normalise.

    `size`: the shortest edge after resizing, or (height, width). `crop`: (height, width).
    """

    size: int | tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resample: int = int(Image.Resampling.BICUBIC)

    @staticmethod
    def load(folder: Path, image_size: int) -> Preprocess:
        """What the directory says; CLIP's way at `image_size` where it says nothing.

        Raises ValueError, one line, for another way or sizes that are not the model's.
        """
        path, described = folder / PREPROCESSORS[0], {}
        if path.is_file():
            described = read_json(path)
        elif (folder / PREPROCESSORS[1]).is_file():  # transformers 5's processors
            path = folder / PREPROCESSORS[1]
            described = read_json(path).get("image_processor", {})
        try:
            return Preprocess.from_dict(described, image_size)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = str(error) if type(error) is ValueError else repr(error)
            raise ValueError(f"{path}: {what}") from error

    @staticmethod
    def from_dict(config: Mapping[str, Any], image_size: int) -> Preprocess:
        """From `preprocessor_config.json`; what it leaves out is CLIP's at `image_size`."""
        config = {key: value for key, value in config.items() if value is not None}
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise ValueError(f"{step} is {config[step]}; CLIP's images are made with it")
        if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"rescale_factor is {config['rescale_factor']}; CLIP's is 1 / 255")
        size = config.get("size", image_size)
        if isinstance(size, Mapping):
            size = size.get("shortest_edge") or (int(size["height"]), int(size["width"]))
        crop = config.get("crop_size", image_size)
        crop = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        if not config.get("do_center_crop", True):
            crop = size if isinstance(size, tuple) else (size, size)
        least = size if isinstance(size, tuple) else (size, size)
        if tuple(crop) != (image_size, image_size) or min(least) < image_size:
            raise ValueError(
                f"it gives {crop[0]} x {crop[1]} px images from {size}; "
                f"the model takes {image_size} x {image_size}"
            )
        mean, std = config.get("image_mean", OPENAI_MEAN), config.get("image_std", OPENAI_STD)
        if len(mean) != 3 or len(std) != 3 or min(map(float, std)) <= 0:
            raise ValueError(f"image_mean {mean} or image_std {std} is not of three channels")
        return Preprocess(
            size=size,
            crop=tuple(crop),
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
            resample=int(Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as `preprocessor_config.json` says it."""
        height, width = self.crop
        shortest = isinstance(self.size, int)
        size = (
            {"shortest_edge": self.size}
            if shortest
            else dict(zip(("height", "width"), self.size, strict=True))
        )
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    def pixels(self, images: jax.Array) -> jax.Array:
        """uint8 [B, h, w, 3] at the model's size to the tower's normalised float32, in JAX."""
        mean = jnp.asarray(self.mean, jnp.float32)[None, None, None]
        std = jnp.asarray(self.std, jnp.float32)[None, None, None]
        return (images.astype(jnp.float32) / 255.0 - mean) / std

    def resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 RGB [H, W, 3] of any size to the model's [h, w, 3], uint8."""
        height, width = image.shape[:2]
        if isinstance(self.size, int):
            short = min(height, width)
            new_h = self.size if height <= width else int(self.size * height / short)
            new_w = self.size if width <= height else int(self.size * width / short)
        else:
            new_h, new_w = self.size
        top, left = (new_h - self.crop[0]) // 2, (new_w - self.crop[1]) // 2
        if new_h * new_w <= MAX_PIXELS:
            resized = Image.fromarray(image).resize((new_w, new_h), self.resample)
            box = (left, top, left + self.crop[1], top + self.crop[0])
            return np.asarray(resized.crop(box))
        # A ribbon: only what stays is computed (equal but for roundings of the box).
        y, x = height / new_h, width / new_w
        box = (left * x, top * y, (left + self.crop[1]) * x, (top + self.crop[0]) * y)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        return np.asarray(Image.fromarray(image).resize(self.crop[::-1], self.resample, box=box))
