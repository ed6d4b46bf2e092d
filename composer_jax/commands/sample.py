"""`composer sample --CONDITION VALUE ... --out DIR`: images from any subset of conditions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.commands.decompose import add_tool_arguments, named_tools
from composer_jax.commands.pictures import grid, save_png
from composer_jax.conditions.decompose import decompose
from composer_jax.data.tools import load_tools
from composer_jax.diffusion import SOLVERS, Use, use
from composer_jax.sampling.pipeline import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; those of conditions are generated from the registry."""
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--model", help="model directory or training workdir (default: bundled)")
    parser.add_argument("--from", dest="image", help="an image to take conditions from")
    parser.add_argument("--use", help="which conditions to take from it, separated by commas")
    parser.add_argument("--count", type=int, default=4, help="how many images (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on seed and i alone")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance weight, 1 for none")
    parser.add_argument("--solver", choices=SOLVERS)
    add_tool_arguments(parser)
    for name in conditions.names():
        group = parser.add_argument_group(name, conditions.get(name).doc)
        group.add_argument(f"--{name}", metavar="VALUE")
        group.add_argument(f"--{name}.strength", type=float, metavar="0..1", default=1.0)
        group.add_argument(f"--{name}.window", type=_window, metavar="START:END", default=(0, 1))
        group.add_argument(f"--{name}.scale", type=float, metavar="WEIGHT")
        group.add_argument(f"--{name}.region", metavar="PNG", help="white where it acts")
        group.add_argument(f"--{name}.negative", metavar="VALUE", help="to move away from")


def run(args: argparse.Namespace) -> None:
    """Writes OUT/0000.png ... and OUT/grid.png."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    if bool(args.image) != bool(args.use):
        raise ValueError("--from IMAGE and --use CONDITIONS go together")
    wanted = args.use.split(",") if args.use else []
    for name in wanted:
        conditions.get(name)
    pipe = Pipeline.load(args.model)
    given: dict[str, Any] = {}
    if args.image:
        tools = {"clip": pipe.clip, **load_tools(**named_tools(args))}
        given |= decompose(conditions.load_image(args.image), only=wanted, tools=tools)
    options = vars(args)
    uses: dict[str, list[Use]] = {}
    for name in conditions.names():
        value, away = options[name], options[f"{name}.negative"]
        value = given.get(name) if value is None else value
        if value is not None:
            region = options[f"{name}.region"]
            uses.setdefault(name, []).append(
                use(
                    value,
                    options[f"{name}.strength"],
                    options[f"{name}.window"],
                    options[f"{name}.scale"],
                    None if region is None else read_region(region),
                )
            )
        if away is not None:
            uses.setdefault(name, []).append(use(away, negative=True))
    images = pipe(
        uses,
        count=args.count,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        solver=args.solver,
    )
    for i, image in enumerate(images):
        save_png(args.out / f"{i:04d}.png", image)
    save_png(args.out / "grid.png", grid(images, min(len(images), 8)))
    asked = ", ".join(uses) or "nothing"
    print(f"{len(images)} images given {asked} in {args.out}, see grid.png")


def read_region(path: str) -> np.ndarray:
    """A picture as float32 [H, W] in [0, 1]: where a use acts."""
    return conditions.load_image(path).mean(-1, dtype=np.float32) / 255.0


def _window(text: str) -> tuple[float, float]:
    start, colon, stop = text.partition(":")
    try:
        return float(start), float(stop if colon else "nothing")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: START:END is wanted, as in 0:0.6") from None
