"""`composer convert SOURCE --out DIR`: Stable Diffusion, CLIP, depth networks in; diffusers out.

Tensors pass one by one: no network is ever in memory as a whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_jax.commands import arguments
from composer_jax.commands.unused import tell
from composer_jax.models.clip import open_clip
from composer_jax.models.dpt_files import is_dpt, open_dpt
from composer_jax.models.files import FORMAT, Tensor, member, read_json, write_tensors
from composer_jax.models.peers import to_peer
from composer_jax.models.pretrained import (
    ABOUT,
    DIFFUSERS,
    KINDS,
    SCHEDULER,
    Pretrained,
    find_source,
    kinds_in,
    open_network,
)
from composer_jax.models.schedulers import (
    described,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)
from composer_jax.utils.atomic import check_writable, write_json
from composer_jax.utils.owned import check_apart, check_replaceable, record, replaced_folder

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Output:
    """A network to write: folder, JSON by name, tensors and their file, what writes the rest."""

    folder: str
    texts: Mapping[str, Mapping[str, Any]]
    weights: str
    tensors: Mapping[str, Tensor]
    rest: Callable[[Path], None] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "source", type=arguments.text, help="directory, .safetensors file or hub name"
    )
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder to write into")
    parser.add_argument("--to", choices=("ours", "diffusers"), default="ours", help="layout")
    parser.add_argument("--only", choices=tuple(KINDS), help="of a source that has several")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: as they are)")
    parser.add_argument(
        "--prediction",
        choices=("eps", "v", "flow"),
        help="what the UNet predicts, whatever the source says of it",
    )


def run(args: argparse.Namespace) -> None:
    """Writes a folder for each network in SOURCE; nothing of OUT changes before all are written.

    A folder is replaced if an earlier call wrote all that is in it.
    """
    source = find_source(args.source)
    kinds = [kind for kind in kinds_in(source) if args.only in (None, kind)]
    if args.prediction and "unet" not in kinds:
        tell("--prediction", "no UNet is converted")
    networks = [open_network(source, kind, args.prediction) for kind in kinds]
    _say(networks)
    if args.to == "diffusers":
        outputs = [one for found in networks for one in _for_diffusers(found)]
    else:
        outputs = [_ours(found) for found in networks]
        outputs += [found] if not args.only and (found := _other(source)) else []
    if not outputs:
        raise ValueError(
            f"{args.source} holds no network that can be converted to {args.to!r}: no unet or vae "
            "of Stable Diffusion, no CLIP, no Depth Anything or DPT"
        )
    folders = [args.out / output.folder for output in outputs]
    check_apart(folders, [source])
    check_writable(args.out)
    for folder in folders:
        check_replaceable(folder)
    with ExitStack() as stack:
        for output, folder in zip(outputs, folders, strict=True):
            new = stack.enter_context(replaced_folder(folder))
            _write(new, output, args.dtype)
            record(new)  # now, so that little can fail between the moves at the end
    print(f"wrote {', '.join(output.folder for output in outputs)} in {args.out}")


def _ours(found: Pretrained) -> Output:
    config = {"format": FORMAT, "kind": found.kind.name, **found.config.to_dict()}
    if found.kind.name == "unet":
        config["process"] = found.process
        config |= {key: value for key in ABOUT if (value := getattr(found, key))}
    return Output(found.kind.name, {"config.json": config}, "model.safetensors", found.tensors)


def _for_diffusers(found: Pretrained) -> list[Output]:
    texts = {"config.json": found.kind.to_diffusers(found.config)}
    weights, tensors = f"{DIFFUSERS}.safetensors", to_peer(found.tensors)
    outputs = [Output(found.kind.name, texts, weights, tensors)]
    if found.process:
        scheduler = {Path(SCHEDULER).name: _scheduler(found)}
        outputs.append(Output("scheduler", scheduler, "", {}))
    return outputs


def _scheduler(found: Pretrained) -> dict:
    """The scheduler's config that a UNet came with, or one that says what is known of it."""
    about = dict(found.process), dict(found.sampler)
    if found.scheduler and scheduler_from_diffusers(found.scheduler) == about:
        return dict(found.scheduler)
    return scheduler_to_diffusers(*about)


def _say(networks: Sequence[Pretrained]) -> None:
    """Says what the UNet predicts and how it is sampled, or that the source does not."""
    for found in networks:
        if found.kind.name == "unet" and not found.process:
            print(
                f"{found.where} does not say what its UNet predicts; --prediction eps or v would "
                "(of Stable Diffusion 2, the 512 px base predicts eps, the 768 px model v)"
            )
        elif found.kind.name == "unet":
            assumed = f" ({found.assumed})" if found.assumed else ""
            print(f"unet {described(found.process, found.sampler)}{assumed}")


def _other(source: Path) -> Output | None:
    """A CLIP or a depth network, of transformers' layout or ours."""
    if not (source / "config.json").is_file():
        return None
    values = read_json(member(source, "config.json"))
    if values.get("model_type") == "clip":
        tensors, rest = open_clip(source)
        return Output("clip", {}, "model.safetensors", to_peer(tensors), rest)
    if is_dpt(values):
        config, tensors = open_dpt(source)
        values = {"format": FORMAT, "kind": "dpt", **config.to_dict()}
        return Output("depth", {"config.json": values}, "model.safetensors", tensors)
    return None


def _write(folder: Path, output: Output, dtype: str | None) -> None:
    for name, values in output.texts.items():
        write_json(folder / name, values)
    if output.rest:
        output.rest(folder)
    if not output.weights:
        return
    tensors = output.tensors
    if dtype:
        tensors = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
    with tqdm(total=len(tensors), unit="tensor", desc=output.folder) as bar:
        counted = {name: _counted(tensor, bar.update) for name, tensor in tensors.items()}
        write_tensors(folder / output.weights, counted)


def _counted(tensor: Tensor, count: Callable[[], Any]) -> Tensor:
    def read():
        count()
        return tensor.read()

    return replace(tensor, read=read)
