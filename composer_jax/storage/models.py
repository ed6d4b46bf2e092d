"""Model directories: JSON and tensors, the contract between train, sample and evaluate.

    model.json            format, config, process, sampler defaults, where it came from
    unet.safetensors      the composer's moving average, float32
    vae/                  config.json, model.safetensors
    clip/                 as transformers saves it

A training workdir holds one under `model/` and can be given wherever a model directory can.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax.models.blocks import default_dtype
from composer_jax.models.composer import Composer, ComposerConfig
from composer_jax.models.detectors import DepthConfig, DepthRegressor
from composer_jax.models.files import (
    FORMAT,
    Tensor,
    fill_module,
    module_tensors,
    open_tensors,
    read_json,
    values_of,
    write_tensors,
)
from composer_jax.models.foreign import refuse_inputs
from composer_jax.models.initializers import abstract
from composer_jax.models.objects import ObjectConfig, ObjectDetector
from composer_jax.models.pretrained import open_vae
from composer_jax.models.vae import VAE
from composer_jax.utils.atomic import write_json
from composer_jax.utils.owned import link, replaced_folder

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ASSETS / "scenes64"


@dataclass(frozen=True)
class Model:
    """A model directory in memory. `info` is all of model.json; `clip` the folder of its CLIP."""

    composer: Composer
    vae: VAE
    clip: Path
    info: dict


def find_part(where: str | Path, part: str) -> Path:
    """The folder of a "vae", "clip", "depth" or "objects": "bundled", itself, or inside a model.

    Raises ValueError where there is none.
    """
    if str(where) == "bundled":
        return BUNDLED / part
    folder = Path(where)
    for candidate in (folder / "model" / part, folder / part, folder):
        if (candidate / "config.json").is_file() and candidate.name != "model":
            return candidate
    raise ValueError(f"{folder} holds no {part}/config.json; give a {part} folder or 'bundled'")


def clip_source(where: str | Path) -> Path | str:
    """What `Clip.load` takes: the folder of "bundled", of a directory, or a hub's name as it is."""
    known = str(where) == "bundled" or Path(where).exists()
    return find_part(where, "clip") if known else where


KINDS = {VAE: "vae", DepthRegressor: "depth", ObjectDetector: "objects"}


def save_part(
    folder: Path, part: VAE | DepthRegressor | ObjectDetector, dtype: str | None = None
) -> None:
    """Writes a network's config and tensors into `folder`, as `write_part` does."""
    kind = KINDS[type(part)]
    tensors = module_tensors(part)
    if dtype:
        tensors = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
    write_part(folder, {"kind": kind, **part.config.to_dict()}, tensors)


def write_part(folder: Path, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.safetensors, one tensor in memory at a time.

    `folder` is replaced in one move, when all is written; what others wrote there stays. Raises
    `WriteError` where the system refuses.
    """
    with replaced_folder(folder, keep=True) as new:
        write_json(new / "config.json", {"format": FORMAT, **config})
        write_tensors(new / "model.safetensors", tensors)


def load_codec(where: str | Path, dtype=jnp.float32) -> VAE:
    """The codec "bundled", of a directory of ours or Stable Diffusion's (`pretrained.open_vae`).

    Raises ValueError, one line, where something is off.
    """
    return open_vae(BUNDLED if str(where) == "bundled" else where).load(dtype)


def load_depth(folder: Path, dtype=jnp.float32) -> DepthRegressor:
    """Reads a depth regressor of `save_part`; raises ValueError where something is off."""
    return _load_detector(folder, DepthRegressor, DepthConfig, dtype)


def load_objects(folder: Path, dtype=jnp.float32) -> ObjectDetector:
    """Reads an object detector of `save_part`; raises ValueError where something is off."""
    return _load_detector(folder, ObjectDetector, ObjectConfig, dtype)


def _load_detector(folder: Path, kind: type, config_kind: type, dtype) -> nnx.Module:
    values = read_json(folder / "config.json")
    values = {key: value for key, value in values.items() if key not in ("format", "kind")}
    with values_of(folder / "config.json"):
        part = abstract(kind, config_kind.from_dict(values), dtype=dtype)
    path = folder / "model.safetensors"
    fill_module(part, open_tensors(path), str(path), dtype)
    return part


def save_model(folder: Path, composer: Composer, parts: Path, info: dict) -> None:
    """Writes a model directory, replacing an older one in one move; what else lies in it stays.

    `parts`: a folder with `vae` and `clip`, whose files are linked in, or copied where links are
    not possible; `info`: process, sampler defaults, origin. Raises `WriteError`.
    """
    with replaced_folder(folder, keep=True) as new:
        absent = {name: list(parts) for name, parts in composer.absent.items()}
        head = {"format": FORMAT, "composer": composer.config.to_dict(), "absent": absent}
        write_json(new / "model.json", {**head, **info})
        write_tensors(new / "unet.safetensors", module_tensors(composer))
        for part in ("vae", "clip"):
            shutil.copytree(parts / part, new / part, copy_function=link)


def find_model(where: str | Path) -> Path | None:
    """The folder of "bundled", of a model directory or of a training workdir; None for others."""
    folder = BUNDLED if str(where) == "bundled" else Path(where)
    return next((at for at in (folder, folder / "model") if (at / "model.json").is_file()), None)


def _no_model(where: str | Path) -> str:
    """Why a place is no model directory, for a message."""
    reason, unet = "does not exist", Path(where) / "unet" / "config.json"
    if unet.is_file():
        values = read_json(unet)
        try:
            refuse_inputs(values.get("in_channels", 4), values.get("out_channels", 4))
        except ValueError as error:
            return f"{where} is {error}"
        reason = "has a UNet alone, which a composer can be trained around (init_from)"
    elif Path(where).exists():
        reason = "has no model.json"
    return f"{where} {reason}; a model directory or training workdir is wanted"


def load_model(where: str | Path | None = None, dtype=None) -> Model:
    """Reads a model directory or a training workdir; without `where` the bundled model.

    `dtype`: what networks are held and compute in, by default `default_dtype()`.
    Raises ValueError, one line, where there is none or a part of it is missing or mis-shaped.
    """
    folder = find_model("bundled" if where is None else where)
    if folder is None:
        raise ValueError(_no_model(where))
    info = read_json(folder / "model.json")
    if info.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {info.get('format')}; this version reads {FORMAT}")
    with values_of(folder / "model.json"):
        config = ComposerConfig.from_dict(info["composer"])
        absent = {
            name: {part: np.zeros(config.parts(name)[part].shape) for part in parts}
            for name, parts in info["absent"].items()
        }

    dtype = dtype or default_dtype()
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; 'float32' or 'bfloat16' is wanted")
    composer, path = abstract(Composer, config, absent, dtype=dtype), folder / "unet.safetensors"
    fill_module(composer, open_tensors(path), str(path), dtype)
    return Model(composer, load_codec(folder, dtype), folder / "clip", info)


def parameter_count(module: nnx.Module) -> int:
    """How many numbers a module holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))
