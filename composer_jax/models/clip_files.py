"""CLIP on disk: finding the directory, reading and writing weights without PyTorch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization, traverse_util
from PIL import Image

WEIGHTS = ("model.safetensors", "flax_model.msgpack")
_SMALL_FILES = ("config.json", "vocab.json", "merges.txt")
_MORE_FILES = ("preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_PIXELS = 2**24  # of a resized image, before it is cropped
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def find_clip(source) -> Path:
    """The directory of a CLIP: `source` itself, or what the hub (or its cache) has under that name.

    Raises ValueError, one line, where there is neither or where a file is missing from it.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    missing = _missing(folder)
    if missing and (pickles := sorted(path.name for path in folder.glob("*.bin"))):
        missing += f"; {pickles[0]} is a pickle, which can run code, and is not read"
    if missing:
        raise ValueError(f"CLIP {source}: {folder} lacks {missing}")
    return folder


def _missing(folder: Path) -> str:
    missing = [name for name in _SMALL_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(" or ".join(WEIGHTS))
    return ", ".join(missing)


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"CLIP {name}: no such directory, and no hub name (owner/model)")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):  # what is in the cache asks nobody
        cached = Path(hf_hub_download(name, _SMALL_FILES[0], local_files_only=True)).parent
        if not _missing(cached):
            return cached
    try:
        files = {file.rfilename for file in HfApi().model_info(name, timeout=10).siblings or ()}
        wanted = [file for file in (*_SMALL_FILES, *_MORE_FILES) if file in files]
        wanted += [file for file in WEIGHTS if file in files][:1]
        if not wanted:
            raise ValueError(f"CLIP {name}: the hub's model is no CLIP of transformers' layout")
        paths = [Path(hf_hub_download(name, file)) for file in wanted]
        return paths[0].parent
    except RepositoryNotFoundError as error:
        raise ValueError(f"CLIP {name}: no such directory, and no such model on the hub") from error
    except (OSError, RuntimeError) as error:  # every failure of the network is an OSError
        raise ValueError(
            f"CLIP {name}: no such directory, and the hub cannot be reached"
            f" ({type(error).__name__}); give a directory with the model's files"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ValueError naming the file where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_weights(folder: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the parameters that `shapes` (a tree of things with `.shape`) names, as float32.

    safetensors hold PyTorch's layout (as on the hub) or Flax's (as its `metadata` says); msgpack
    holds Flax's. Raises ValueError naming the first tensor that is missing or of another shape.
    """
    path = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    try:
        tensors, layout = _read_safetensors(path) if path.suffix != ".msgpack" else _unpack(path)
    except Exception as error:  # the formats' readers each have their own errors
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    params = {}
    for key, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        name = ".".join(key) if layout == "flax" else _peer_name(key)
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
        array = np.asarray(tensors[name], dtype=np.float32)
        array = array if layout == "flax" else _from_peer(key, array)
        if array.shape != leaf.shape:
            raise ValueError(
                f"{path}: tensor {name} gives {array.shape}, config.json asks {leaf.shape}"
            )
        params[key] = array
    return traverse_util.unflatten_dict(params)


def write_weights(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` in the layout that PyTorch's and Flax's CLIP both load."""
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(dict(params))
    tensors = {_peer_name(key): _to_peer(key, np.asarray(value)) for key, value in flat.items()}
    save_file(tensors, folder / WEIGHTS[0], metadata={"format": "pt"})


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    from safetensors import safe_open

    with safe_open(path, framework="flax") as file:  # Flax's reader knows bfloat16
        layout = (file.metadata() or {}).get("format", "pt")
        return {key: file.get_tensor(key) for key in file.keys()}, layout  # noqa: SIM118


def _unpack(path: Path) -> tuple[dict[str, np.ndarray], str]:
    tree = serialization.msgpack_restore(path.read_bytes())
    return traverse_util.flatten_dict(tree, sep="."), "flax"


def _peer_name(key: tuple[str, ...]) -> str:
    leaf = "weight" if key[-1] in ("kernel", "scale", "embedding") else key[-1]
    return ".".join((*key[:-1], leaf))


def _from_peer(key: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if key[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_peer(key: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if key[-1] == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.array(array, order="C")


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
    def from_dict(config: Mapping[str, Any], image_size: int) -> Preprocess:
        """From `preprocessor_config.json`; what it leaves out is CLIP's at `image_size`."""
        size = config.get("size", image_size)
        if isinstance(size, Mapping):
            size = size.get("shortest_edge") or (int(size["height"]), int(size["width"]))
        crop = config.get("crop_size", image_size)
        crop = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        if not config.get("do_center_crop", True):
            crop = size if isinstance(size, tuple) else (size, size)
        least = size if isinstance(size, tuple) else (size, size)
        if tuple(crop) != (image_size, image_size) or least < tuple(crop):
            raise ValueError(
                f"preprocessor_config.json gives {crop[0]} x {crop[1]} px images from {size}; "
                f"the model takes {image_size} x {image_size}"
            )
        return Preprocess(
            size=size,
            crop=tuple(crop),
            mean=tuple(config.get("image_mean", OPENAI_MEAN)),
            std=tuple(config.get("image_std", OPENAI_STD)),
            resample=int(config.get("resample", Image.Resampling.BICUBIC)),
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
