"""`composer convert SOURCE --out DIR`: Stable Diffusion, CLIP, depth networks in; diffusers out.

Tensors pass one by one: no network is ever in memory as a whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_jax.commands import arguments
from composer_jax.commands.unused import tell
from composer_jax.models import foreign
from composer_jax.models.caption_only import NoCounterpart, open_caption_unet
from composer_jax.models.clip import open_clip, open_text_encoder
from composer_jax.models.dpt_files import is_dpt, open_dpt
from composer_jax.models.files import (
    FORMAT,
    Tensor,
    member,
    open_tensors,
    read_json,
    write_tensors,
)
from composer_jax.models.hub import is_hub_name
from composer_jax.models.peers import to_peer
from composer_jax.models.pretrained import (
    ABOUT,
    DIFFUSERS,
    KINDS,
    SCHEDULER,
    Pretrained,
    find_source,
    kinds_in,
    left_out,
    open_network,
)
from composer_jax.models.schedulers import (
    described,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)
from composer_jax.storage.models import find_model
from composer_jax.utils.atomic import check_writable, write_json
from composer_jax.utils.owned import (
    check_apart,
    check_ours,
    check_replaceable,
    record,
    replaced_folder,
)

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.2",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],  # whose rules are the composer's
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
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
    if not args.source:
        raise ValueError("SOURCE is empty; a directory, .safetensors file or hub name is wanted")
    source = find_source(args.source, args.only)
    where = args.source if is_hub_name(args.source) else source
    composer = find_model(source) if source.is_dir() else None
    if composer and args.to == "diffusers" and args.only != "vae":
        try:
            outputs, said = _pipeline(composer, args.only, args.prediction)
        except NoCounterpart as reason:
            if args.only != "unet":
                raise
            outputs, _ = _networks(source, where, args)
            said = f": the composer's whole UNet, for which diffusers has no pipeline ({reason})"
    else:
        outputs, said = _networks(source, where, args)
    if not outputs:
        raise ValueError(
            f"{args.source} holds no {args.only or 'network'} that can be converted to "
            f"{args.to!r}: no unet or vae of Stable Diffusion, no CLIP, no Depth Anything or DPT"
            f"{_instead(source)}"
        )
    if args.prediction and "unet" not in {output.folder for output in outputs}:
        tell("--prediction", "no UNet is converted")
    folders = [args.out / output.folder for output in outputs if output.folder]
    beside = {name: values for o in outputs if not o.folder for name, values in o.texts.items()}
    check_apart(folders, [source])
    check_writable(args.out)
    for folder in folders:
        check_replaceable(folder)
    check_ours(args.out, beside)
    with ExitStack() as stack:
        for output in outputs:
            if output.folder:
                new = stack.enter_context(replaced_folder(args.out / output.folder))
                _write(new, output, args.dtype)
                record(new)  # now, so that little can fail between the moves at the end
    for name, values in beside.items():
        write_json(args.out / name, values)
        record(args.out, [args.out / name])
    names = [output.folder for output in outputs if output.folder] + list(beside)
    print(f"wrote {', '.join(names)} in {args.out}{said}")


def _instead(source: Path) -> str:
    """What a source without a network seems to be, for a message."""
    if source.is_file():
        seems = foreign.of_file(open_tensors(source))
        return f"; it seems to be {seems}" if seems else ""
    path = member(source, "config.json")
    seems = foreign.of_folder(source, read_json(path) if path.is_file() else {})
    return f"; {seems}" if seems else ""


def _networks(source: Path, where: Path | str, args) -> tuple[list[Output], str]:
    """What is written of a source's networks, and what else it has; `where`: its name, by which
    the hub is asked for weights."""
    kinds = kinds_in(source, args.only)
    networks = [open_network(where, kind, args.prediction) for kind in kinds]
    _say(networks)
    if args.to == "diffusers":
        outputs = [one for found in networks for one in _for_diffusers(found)]
    else:
        outputs = [_ours(found) for found in networks]
        outputs += [found] if not args.only and (found := _other(source, where)) else []
    rest = "" if args.only or not networks else left_out(source)
    return outputs, f"; left out: {rest}" if rest else ""


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


def _pipeline(folder: Path, only: str | None, prediction: str | None) -> tuple[list[Output], str]:
    """A composer's caption alone as a pipeline of Stable Diffusion, or its UNet (`only`).

    Raises ValueError where diffusers' pipeline does something else than the composer.
    """
    unet, words, others = open_caption_unet(folder)
    schedule, trained = unet.process["schedule"], unet.process["prediction"]
    if prediction not in (None, trained):
        raise ValueError(f"--prediction is {prediction}; {folder} was trained for {trained}")
    if schedule != "sd":
        raise NoCounterpart(
            f"{folder} was trained on the {schedule} schedule, which diffusers has no Stable "
            "Diffusion with; --only unet and --only vae take its networks"
        )
    vae, info = open_network(folder, "vae"), read_json(folder / "model.json")
    outputs = [one for found in ([unet] if only else [unet, vae]) for one in _for_diffusers(found)]
    if "latents_mean" in vae.kind.to_diffusers(vae.config):
        raise NoCounterpart(
            f"{folder}: its codec's latents have a mean and a deviation for each channel, which "
            "diffusers' Stable Diffusion does not apply"
        )
    text, tensors, tokenizer = open_text_encoder(folder / "clip", **info.get("clip_text", {}))
    texts, weights = dict(outputs[0].texts), dict(outputs[0].tensors)
    texts["config.json"] |= {"sample_size": info["image_size"] // vae.config.factor}
    if words:  # which go through a projection first
        width = next(iter(words.values())).shape[0]
        texts["config.json"] |= {"encoder_hid_dim": width, "encoder_hid_dim_type": "text_proj"}
        weights |= to_peer({f"encoder_hid_proj.{name}": t for name, t in words.items()})
    outputs[0] = replace(outputs[0], texts=texts, tensors=weights)
    if not only:
        scheduler = outputs[1].texts[Path(SCHEDULER).name]["_class_name"]
        index = PIPELINE | {"scheduler": ["diffusers", scheduler]}
        outputs += [
            Output("text_encoder", {"config.json": text}, "model.safetensors", to_peer(tensors)),
            Output("tokenizer", {}, "", {}, tokenizer),
            Output("", {"model_index.json": index}, "", {}),
        ]
    left = f"; {', '.join(others)} have no counterpart there and are left out" if others else ""
    return outputs, f": the composer as a text-to-image model of its caption alone{left}"


def _other(source: Path, where: Path | str) -> Output | None:
    """A CLIP or a depth network, of transformers' layout or ours."""
    if not (source / "config.json").is_file():
        return None
    values = read_json(member(source, "config.json"))
    if values.get("model_type") == "clip":
        tensors, rest = open_clip(where)
        return Output("clip", {}, "model.safetensors", to_peer(tensors), rest)
    if is_dpt(values):
        config, tensors = open_dpt(where)
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
