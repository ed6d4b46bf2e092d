"""Stable Diffusion's networks from wherever they lie: found, checked, opened, not yet read.

A source is a directory of diffusers (or its `unet` or `vae` alone), a single safetensors file as
CompVis published it, a directory of ours, or a name on the hub. Opening reads configs and headers:
what is missing, surplus or mis-shaped is said before any number is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from composer_jax.diffusion.process import Process
from composer_jax.models import foreign, layouts
from composer_jax.models.files import (
    FORMAT,
    Tensor,
    compare,
    fill_module,
    member,
    module_tensors,
    open_tensors,
    read_json,
    refuse_pickle,
    values_of,
)
from composer_jax.models.hub import find_folder
from composer_jax.models.initializers import abstract
from composer_jax.models.peers import Rules, from_peer
from composer_jax.models.schedulers import scheduler_from_diffusers, trained_for, with_prediction
from composer_jax.models.unet import UNet, UNetConfig
from composer_jax.models.vae import VAE, VAEConfig
from composer_jax.models.weight_files import choose_weights, find_weights, lacking_weights

DIFFUSERS = "diffusion_pytorch_model"  # what diffusers calls its weights
SCHEDULER = "scheduler/scheduler_config.json"
ABOUT = ("process", "sampler", "scheduler")  # what our files say of a UNet, beside its config
MODEL_INDEX = "model_index.json"  # a pipeline's: which parts it has, each in a folder


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

    `where` names the file in messages. Of a UNet `process` is what it predicts, as
    `Process.to_dict` has it, {} where the source does not say, and `assumed` a line where that is
    not the source's own word; `sampler` is how its authors sample it, fields of `Options`, and
    `scheduler` the config of diffusers that both were read from.
    """

    kind: Kind
    config: Any
    tensors: Mapping[str, Tensor]
    where: str
    process: Mapping[str, Any]
    assumed: str = ""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)

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


def open_network(source, name: str, prediction: str | None = None) -> Pretrained:
    """The network of a source that `name`, one of KINDS, says; raises ValueError as `open_unet`.

    `prediction`: what a UNet predicts, eps, v or flow, whatever the source says of it.
    """
    found = _opened(source, KINDS[name], prediction)
    if prediction is None or name != "unet":
        return found
    process = with_prediction(found.process, prediction)
    if found.process.get("prediction") == prediction:
        return replace(found, process=process, assumed="")
    sampler = found.sampler if process["schedule"] == found.process.get("schedule") else {}
    said = found.process.get("prediction") if not found.assumed else None
    assumed = f"as asked; {found.where} says {said}" if said else ""
    return replace(found, process=process, assumed=assumed, sampler=sampler, scheduler={})


def _opened(source, kind: Kind, prediction: str | None) -> Pretrained:
    if Path(source).is_file():
        return _compvis(Path(source), kind, prediction)

    def missing(folder: Path) -> str:
        if _place(folder, kind):
            return ""
        instead = foreign.of_pipeline(_entries(folder), folder)
        return f"{kind.name}/config.json" + (f"; {instead}" if instead else "")

    def incomplete(folder: Path) -> str:
        return missing(folder) or _incomplete(folder, kind)

    choose = partial(_choose, folders=(kind.name, "scheduler", ""))
    root = find_folder(source, kind.name, choose, missing, incomplete)
    place = _place(root, kind)
    values = read_json(member(root, place))
    try:
        if "format" in values:
            return _ours(root, place, values, kind)
        return _diffusers(root, place, values, kind, prediction)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # of a wrong value
        raise ValueError(f"{root / place} is broken: {error!r}") from error


def find_source(source, only: str | None = None) -> Path:
    """A file, a directory, or the directory that the hub's JSON of that name was fetched to.

    `only`: the one network that is asked for. Raises ValueError, one line, where it is none of
    them.
    """
    path = Path(source)
    if path.exists():
        return path

    def incomplete(folder: Path) -> str:
        wanted = [only] if only else _promised(folder)
        if not wanted and not (folder / "config.json").is_file():
            return MODEL_INDEX
        return ", ".join(f"{k}/config.json" for k in wanted if not _place(folder, KINDS[k]))

    def choose(files: set[str]) -> list[str]:
        folders = ("", *KINDS, "scheduler")
        return [name for name in _choose(files, folders) if name.endswith(".json")]

    return find_folder(source, "model", choose, lambda folder: "", incomplete)


def kinds_in(source: Path, only: str | None = None) -> list[str]:
    """Which of KINDS a file or directory holds, or whether it holds `only`; nothing of it is
    checked yet.

    Raises ValueError where a directory's model_index.json names one that is not there, or a network
    of another kind in place of the UNet, unless `only` asks for what is there.
    """
    if source.is_file():
        tensors = _open_file(source)
        found = [kind for kind in KINDS if layouts.compvis_part(tensors, kind)]
        return [kind for kind in found if only in (None, kind)]
    found = [name for name, kind in KINDS.items() if _place(source, kind)]
    if only in found:
        return [only]
    there = f"; --only {found[0]} would take what is there" if found else ""
    for name in _promised(source):
        if name not in found:
            raise ValueError(
                f"{source} lacks {name}/config.json, and its {MODEL_INDEX} names a {name}{there}"
            )
    instead = foreign.of_pipeline(_entries(source), source)
    if instead and "unet" not in found:
        raise ValueError(f"{source} holds no UNet: {instead}{there}")
    return [] if only else found


def _promised(folder: Path) -> list[str]:
    """The networks that a pipeline's model_index.json names."""
    values = _entries(folder)
    return [name for name in KINDS if (values.get(name) or [None])[0]]


def _incomplete(root: Path, kind: Kind) -> str:
    """What a snapshot of the hub lacks of a network whose config is there."""
    place = _place(root, kind)
    ours = "format" in read_json(member(root, place))
    stem = ("unet" if place.endswith("model.json") else "model") if ours else DIFFUSERS
    lacks = lacking_weights(root, str(Path(place).parent / stem))
    if lacks or kind.name != "unet" or place != "unet/config.json":
        return lacks
    # what a UNet predicts stands beside it
    entries = _entries(root)
    needless = entries and "scheduler" not in entries
    return "" if needless or (root / SCHEDULER).is_file() else SCHEDULER


def left_out(source: Path) -> str:
    """What of a single file or a pipeline's directory is neither UNet nor codec, "" for nothing."""
    if source.is_file():
        parts = {name.split(".")[0] for name in open_tensors(source)}
    else:
        parts = {name for name, value in _entries(source).items() if isinstance(value, list)}
        parts = {name for name in parts if _entries(source)[name][:1] not in ([], [None])}
    named = [what for part, what in foreign.PARTS.items() if part in parts]
    return ", ".join(dict.fromkeys(named))


def _entries(root: Path) -> dict:
    path = member(root, MODEL_INDEX)
    return read_json(path) if path.is_file() else {}


def _diffusers(root: Path, place: str, values: dict, kind: Kind, prediction) -> Pretrained:
    try:
        config, about = kind.from_diffusers(values), {"process": {}}
    except ValueError as error:
        raise ValueError(f"{root / place}: {error}") from error
    if kind.name == "unet" and (root / SCHEDULER).is_file():
        about = _scheduler(root, prediction)
    path = find_weights(root, str(Path(place).parent / DIFFUSERS))
    tensors = {layouts.new_name(name): t for name, t in open_tensors(path, root).items()}
    return _translated(kind, config, tensors, path, about, ())


def _scheduler(root: Path, prediction: str | None) -> dict:
    """What a diffusers directory says of process and sampler; with `prediction` given, a scheduler
    that we do not know is left out."""
    values = read_json(member(root, SCHEDULER))
    try:
        process, sampler = scheduler_from_diffusers(values)
    except ValueError as error:
        if prediction is None:
            raise ValueError(
                f"{root / SCHEDULER}: {error}; to take the UNet without it, say what the UNet "
                "predicts: composer convert --prediction eps (or v, flow)"
            ) from error
        return {"process": trained_for(values)}
    return {"process": process, "sampler": sampler, "scheduler": values}


def _open_file(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a single file; raises ValueError where it is of another kind."""
    refuse_pickle(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file, and no other single file is read")
    return open_tensors(path)


def _compvis(path: Path, kind: Kind, prediction: str | None) -> Pretrained:
    every = _open_file(path)
    tensors, what = layouts.compvis_part(every, kind.name), foreign.of_file(every)
    if not tensors:
        raise ValueError(
            f"{path} holds no {kind.name}: no tensor is named {layouts.COMPVIS_PREFIX[kind.name]}*"
            + (f"; it seems to be {what}" if what else "")
        )
    try:
        config, rules = kind.from_compvis(tensors)
    except (ValueError, IndexError) as error:
        seems = f"; it seems to be {what}" if what else ""
        raise ValueError(f"{path}: {error}{seems}") from error
    about = {"process": {}}
    if kind.name == "unet":
        about = _marked(path, every, config.use_linear_projection, prediction)
    return _translated(kind, config, tensors, path, about, rules, layouts.COMPVIS_LOSS)


def _marked(path: Path, tensors: Mapping, linear: bool, prediction: str | None) -> dict:
    """What a single file says of its UNet's process: by tensors that are marks, or by its kind.

    UNets with linear layers, Stable Diffusion 2's, there are of both kinds.
    """
    zero = "ztsnr" in tensors
    if zero and "v_pred" not in tensors and prediction is None:
        raise ValueError(
            f"{path} is marked ztsnr but not v_pred, and eps cannot start from pure noise; "
            "composer convert --prediction v reads it"
        )
    if zero or "v_pred" in tensors:
        return {"process": {**with_prediction({}, "v"), "zero_terminal_snr": zero}}
    if linear:
        return {"process": {}}
    assumed = "eps is assumed, as Stable Diffusion 1 predicts it; --prediction overrules"
    return {"process": with_prediction({}, "eps"), "assumed": assumed}


def _translated(kind: Kind, config, tensors, path: Path, about, rules, ignore="") -> Pretrained:
    if kind.name == "unet":
        try:
            foreign.refuse_inputs(config.in_channels, config.out_channels)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from None
    wanted = module_tensors(_abstract(kind, config))
    ours = from_peer(wanted, tensors, str(path), rules, ignore)
    return Pretrained(kind, config, ours, str(path), **about)


def _ours(root: Path, place: str, values: dict, kind: Kind) -> Pretrained:
    if values["format"] != FORMAT:
        raise ValueError(f"{root / place}: format {values['format']}; this version reads {FORMAT}")
    if place.endswith("model.json"):  # of a composer, whose file holds more than its UNet
        with values_of(root / place):
            config = kind.config.from_dict(values["composer"]["unet"])
        path = find_weights(root, str(Path(place).parent / "unet"))
        tensors = {
            name.removeprefix("unet."): tensor
            for name, tensor in open_tensors(path, root).items()
            if name.startswith("unet.")
        }
    else:
        known = {k: v for k, v in values.items() if k not in ("format", "kind", *ABOUT)}
        with values_of(root / place):
            config = kind.config.from_dict(known)
        path = find_weights(root, str(Path(place).parent / "model"))
        tensors = open_tensors(path, root)
    wanted = module_tensors(_abstract(kind, config))
    compare({name: t.shape for name, t in wanted.items()}, tensors, str(path))
    with values_of(root / place):
        about = {"process": {}} | {key: dict(values[key]) for key in ABOUT if key in values}
        Process.from_dict(about["process"])  # what is no process is said here
    return Pretrained(kind, config, tensors, str(path), **about)


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
    """What to fetch of a hub's files: JSON, texts and one variant of the weights of each folder."""
    chosen = []
    for folder in folders:
        split = (name.rpartition("/") for name in sorted(files))
        names = [leaf for parent, _, leaf in split if parent == folder]
        texts = [n for n in names if n.endswith((".json", ".txt")) and ".index." not in n]
        weights = choose_weights(names, DIFFUSERS, "model")
        chosen += [f"{folder}/{name}".lstrip("/") for name in (*texts, *weights)]
    return chosen
