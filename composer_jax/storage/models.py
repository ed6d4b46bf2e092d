"""Model directories: JSON and tensors, the contract between train, sample and evaluate.

    model.json            format, config, process, sampler defaults, where it came from
    unet.safetensors      the composer's moving average, float32
    vae/                  config.json, model.safetensors
    clip/                 as transformers saves it

A training workdir holds one under `model/` and can be given wherever a model directory can.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from composer_jax.models.composer import Composer, ComposerConfig
from composer_jax.models.vae import VAE, VAEConfig
from composer_jax.storage.tensors import fill_module, load_tensors, module_tensors, save_tensors

FORMAT = 1
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
    """The folder of a codec ("vae") or CLIP ("clip"): "bundled", itself, or inside a model.

    Raises ValueError where there is none.
    """
    if str(where) == "bundled":
        return BUNDLED / part
    folder = Path(where)
    for candidate in (folder / "model" / part, folder / part, folder):
        if (candidate / "config.json").is_file() and candidate.name != "model":
            return candidate
    raise ValueError(f"{folder} holds no {part}/config.json; give a {part} folder or 'bundled'")


def save_codec(folder: Path, vae: VAE, dtype: str | None = None) -> None:
    """Writes a codec's config and tensors into `folder`, replacing it in one move."""
    with _replacing(folder) as new:
        _write_json(new / "config.json", {"format": FORMAT, **vae.config.to_dict()})
        save_tensors(new / "model.safetensors", module_tensors(vae), dtype)


def load_codec(folder: Path, dtype=jnp.float32) -> VAE:
    """Reads what `save_codec` wrote; raises ValueError, one line, where something is off."""
    config = _read_json(folder / "config.json")
    config.pop("format", None)
    vae = nnx.eval_shape(lambda: VAE(VAEConfig.from_dict(config), dtype=dtype, rngs=nnx.Rngs(0)))
    _fill(vae, folder / "model.safetensors")
    return vae


def save_model(folder: Path, composer: Composer, vae: Path, clip: Path, info: dict) -> None:
    """Writes a model directory, replacing an older one in one move.

    `vae`, `clip`: folders that are copied in; `info`: process, sampler defaults, origin.
    """
    with _replacing(folder) as new:
        absent = {name: list(parts) for name, parts in composer.absent.items()}
        head = {"format": FORMAT, "composer": composer.config.to_dict(), "absent": absent}
        _write_json(new / "model.json", {**head, **info})
        save_tensors(new / "unet.safetensors", module_tensors(composer))
        shutil.copytree(vae, new / "vae")
        shutil.copytree(clip, new / "clip")


def load_model(where: str | Path | None = None, dtype=jnp.float32) -> Model:
    """Reads a model directory or a training workdir; without `where` the bundled model.

    Raises ValueError, one line, where there is none or a part of it is missing or mis-shaped.
    """
    folder = BUNDLED if where is None else Path(where)
    if not (folder / "model.json").is_file() and (folder / "model" / "model.json").is_file():
        folder = folder / "model"
    if not (folder / "model.json").is_file():
        if where is None:
            raise ValueError("no model is bundled yet; train one and give its folder as the model")
        reason = "does not exist" if not folder.exists() else "has no model.json"
        raise ValueError(f"{folder} {reason}; a model directory or training workdir is wanted")
    info = _read_json(folder / "model.json")
    if info.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {info.get('format')}; this version reads {FORMAT}")
    config = ComposerConfig.from_dict(info["composer"])

    def build():
        absent = {
            name: {part: jnp.zeros(config.parts(name)[part].shape) for part in parts}
            for name, parts in info["absent"].items()
        }
        return Composer(config, absent, dtype=dtype, rngs=nnx.Rngs(0))

    composer = nnx.eval_shape(build)
    _fill(composer, folder / "unet.safetensors")
    return Model(composer, load_codec(folder / "vae", dtype), folder / "clip", info)


def _fill(module: nnx.Module, path: Path) -> None:
    fill_module(module, load_tensors(path), str(path))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


class _replacing:
    """Gives a new empty folder that takes the old one's place when all went well."""

    def __init__(self, folder: Path):
        self.folder, self.new = folder, folder.with_name(folder.name + ".new")

    def __enter__(self) -> Path:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.new.rename(self.folder)
        else:
            shutil.rmtree(self.new, ignore_errors=True)


def parameter_count(module: nnx.Module) -> int:
    """How many numbers a module holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))
