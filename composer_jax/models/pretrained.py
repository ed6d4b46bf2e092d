"""Stable Diffusion's networks from wherever they lie: found, checked, opened, not yet read.

A source is a directory of diffusers (or its `unet` or `vae` alone), a single safetensors file as
CompVis published it, a directory of ours, or a name on the hub. Opening reads configs and headers:
what is missing, surplus or mis-shaped is said before any number is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from composer_jax.models import layouts
from composer_jax.models.files import (
    FORMAT,
    Tensor,
    compare,
    fill_module,
    find_weights,
    member,
    module_tensors,
    open_tensors,
    read_json,
)
from composer_jax.models.hub import find_folder
from composer_jax.models.initializers import abstract
from composer_jax.models.peers import Rules, from_peer
from composer_jax.models.unet import UNet, UNetConfig
from composer_jax.models.vae import VAE, VAEConfig

DIFFUSERS = "diffusion_pytorch_model"  # what diffusers calls its weights
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Kind:
    """A network that can be opened, and how the two layouts are read."""

    name: str
    network: type[nnx.Module]
    config: type
    peer: str  # diffusers' class
    from_diffusers: Callable[[Mapping], Any]
    to_diffusers: Callable[[Any], dict]
    from_compvis: Callable[[Mapping[str, Tensor]], tuple[Any, Rules]]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("unet", UNet, UNetConfig, "UNet2DConditionModel",
             layouts.unet_from_diffusers, layouts.unet_to_diffusers, layouts.unet_from_compvis),
        Kind("vae", VAE, VAEConfig, "AutoencoderKL",
             layouts.vae_from_diffusers, layouts.vae_to_diffusers, layouts.vae_from_compvis),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """A network on disk: its config, and its tensors under our names and in our axes, unread.

    `where` names the file in messages; `process` is what a UNet predicts, as `Process.to_dict` has
    it, {} where the source does not say.
    """

    kind: Kind
    config: Any
    tensors: Mapping[str, Tensor]
    where: str
    process: Mapping[str, Any]

    def load(self, dtype=jnp.float32) -> nnx.Module:
        """The network, held and computing in `dtype`; raises ValueError for broken numbers."""
        module = _abstract(self.kind, self.config, dtype)
        fill_module(module, self.tensors, self.where, dtype)
        return module


def open_unet(source) -> Pretrained:
    """The UNet of a source; raises ValueError, one line, where there is none or it is broken."""
    return open_network(source, "unet")


def open_vae(source) -> Pretrained:
    """The codec of a source; raises ValueError, one line, where there is none or it is broken."""
    return open_network(source, "vae")


def open_network(source, name: str) -> Pretrained:
    """The network of a source that `name`, one of KINDS, says; raises ValueError as `open_unet`."""
    kind = KINDS[name]
    if Path(source).is_file():
        return _compvis(Path(source), kind)

    def missing(folder: Path) -> str:
        return "" if _place(folder, kind) else f"{kind.name}/config.json"

    choose = partial(_choose, folders=(kind.name, "scheduler", ""))
    root = find_folder(source, kind.name, choose, missing)
    place = _place(root, kind)
    values = read_json(member(root, place))
    try:
        return (_ours if "format" in values else _diffusers)(root, place, values, kind)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # of a wrong value
        raise ValueError(f"{root / place} is broken: {error!r}") from error


def find_source(source) -> Path:
    """A file, a directory, or the directory that the hub's files of that name were fetched to.

    Raises ValueError, one line, where it is none of them.
    """
    path = Path(source)
    if path.exists():
        return path
    choose = partial(_choose, folders=("", *KINDS, "scheduler"))
    return find_folder(source, "model", choose, lambda folder: "")


def kinds_in(source: Path) -> list[str]:
    """Which of KINDS a file or directory holds; nothing of it is checked yet."""
    if source.is_file():
        names = list(open_tensors(source))
        prefixes = layouts.COMPVIS_PREFIX.items()
        return [kind for kind, prefix in prefixes if any(n.startswith(prefix) for n in names)]
    return [name for name, kind in KINDS.items() if _place(source, kind)]


def _diffusers(root: Path, place: str, values: dict, kind: Kind) -> Pretrained:
    try:
        config, process = kind.from_diffusers(values), {}
    except ValueError as error:
        raise ValueError(f"{root / place}: {error}") from error
    if kind.name == "unet" and (root / SCHEDULER).is_file():
        process = layouts.process_from_diffusers(read_json(member(root, SCHEDULER)))
    path = find_weights(root, str(Path(place).parent / DIFFUSERS))
    tensors = {layouts.new_name(name): t for name, t in open_tensors(path, root).items()}
    return _translated(kind, config, tensors, path, process, ())


def _compvis(path: Path, kind: Kind) -> Pretrained:
    tensors = open_tensors(path)
    prefix = layouts.COMPVIS_PREFIX[kind.name]
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{path} holds no {kind.name}: no tensor is named {prefix}*")
    try:
        config, rules = kind.from_compvis(tensors)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error
    process = {}  # of a UNet with linear layers, Stable Diffusion 2's, there are both kinds
    if kind.name == "unet" and not config.use_linear_projection:
        process = layouts.process_from_diffusers({})
    return _translated(kind, config, tensors, path, process, rules, layouts.COMPVIS_LOSS)


def _translated(kind: Kind, config, tensors, path: Path, process, rules, ignore="") -> Pretrained:
    wanted = module_tensors(_abstract(kind, config))
    ours = from_peer(wanted, tensors, str(path), rules, ignore)
    return Pretrained(kind, config, ours, str(path), process)


def _ours(root: Path, place: str, values: dict, kind: Kind) -> Pretrained:
    if values["format"] != FORMAT:
        raise ValueError(f"{root / place}: format {values['format']}; this version reads {FORMAT}")
    if place.endswith("model.json"):  # of a composer, whose file holds more than its UNet
        config = kind.config.from_dict(values["composer"]["unet"])
        path = find_weights(root, str(Path(place).parent / "unet"))
        tensors = {
            name.removeprefix("unet."): tensor
            for name, tensor in open_tensors(path, root).items()
            if name.startswith("unet.")
        }
    else:
        known = {k: v for k, v in values.items() if k not in ("format", "kind", "process")}
        config = kind.config.from_dict(known)
        path = find_weights(root, str(Path(place).parent / "model"))
        tensors = open_tensors(path, root)
    wanted = module_tensors(_abstract(kind, config))
    compare({name: t.shape for name, t in wanted.items()}, tensors, str(path))
    return Pretrained(kind, config, tensors, str(path), dict(values.get("process", {})))


def _abstract(kind: Kind, config, dtype=jnp.float32) -> nnx.Module:
    return abstract(kind.network, config, dtype=dtype)


def _place(root: Path, kind: Kind) -> str | None:
    """The JSON that describes a network of this kind, relative to `root`."""
    for folder in (kind.name, f"model/{kind.name}"):
        if (root / folder / "config.json").is_file():
            return f"{folder}/config.json"
    if (root / "config.json").is_file():
        values = read_json(member(root, "config.json"))
        if kind.name == values.get("kind") or kind.peer == values.get("_class_name"):
            return "config.json"
    if kind.name == "unet":
        return next((n for n in ("model.json", "model/model.json") if (root / n).is_file()), None)
    return None


def _choose(files: set[str], folders: Sequence[str]) -> list[str]:
    """What to fetch of a hub's files: JSON, texts and whole-precision weights of known names."""
    known = rf"({DIFFUSERS}|model)(-\d+-of-\d+)?\.safetensors|[^/]+\.(json|txt)"
    split = ((name, *name.rpartition("/")[::2]) for name in sorted(files))
    return [n for n, folder, leaf in split if folder in folders and re.fullmatch(known, leaf)]
