"""`composer edit TASK IMAGE... --out DIR`: Composer's tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from composer_jax import conditions
from composer_jax.commands import arguments
from composer_jax.commands.decompose import add_tool_arguments, named_tools
from composer_jax.commands.sample import (
    add_sampling_arguments,
    add_switches,
    check_out,
    open_pipeline,
    read_region,
    sampling_options,
    switched,
)
from composer_jax.commands.unused import check_switches, tell, tell_tools
from composer_jax.conditions.image import load_rgba
from composer_jax.data.tools import load_tools
from composer_jax.evaluation.pictures import grid
from composer_jax.sampling.edits import TASKS, Task
from composer_jax.sampling.picture import Picture
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.series import Series, describe, describe_model, describe_uses
from composer_jax.utils.owned import record
from composer_jax.utils.png import save_png
from composer_jax.utils.precision import current_precision

# What tasks take beside images and factors: how it is read, and what it is.
OPTIONS: dict[str, tuple[Any, str, str]] = {
    "hold": (
        arguments.names,
        "NAMES",
        "factors shared with the (first) image, instead of the task's own",
    ),
    "hold_second": (arguments.names, "NAMES", "factors shared with the second image"),
    "vary": (
        arguments.names,
        "NAMES",
        "factors not shared with it (interpolation: those that move)",
    ),
    "strength": (arguments.share, "0..1", "how far it goes"),
    "region": (arguments.path, "PNG", "white where the picture may change; elsewhere pixels stay"),
    "border": (
        arguments.number(0.0, 16_384.0),
        "PIXELS",
        "over which the change fades in from the region's edge",
    ),
    "garment_region": (arguments.path, "PNG", "white where the garment is in its image"),
}
FORMER = {"precision": "default"}  # what calls did before there was this key in call.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each task, made from what `TASKS` says it takes."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        sub = tasks.add_parser(name, help=task.doc, description=task.doc, allow_abbrev=False)
        sub.set_defaults(parser=sub)
        for image in task.images:
            sub.add_argument(
                f"image.{image}", metavar=image.upper(), type=arguments.path, help="an image file"
            )
        sub.add_argument("--out", required=True, type=arguments.folder, help="folder to write")
        sub.add_argument(
            "--count", type=arguments.count, default=task.count, help="(default %(default)s)"
        )
        for option in task.options:
            read, metavar, text = OPTIONS[option]
            flag, needed = f"--{option.replace('_', '-')}", option in task.needs
            sub.add_argument(
                flag, dest=option, type=read, metavar=metavar, help=text, required=needed
            )
        add_sampling_arguments(sub)
        add_tool_arguments(sub)
        given = sub.add_argument_group("factors", "what the result is to have")
        known = sub.add_argument_group("known", "what is known of the (first) image")
        for condition in map(conditions.get, conditions.names()):
            needed = condition.name in task.needs
            flag = f"--{condition.name}"
            given.add_argument(flag, metavar="VALUE", help=condition.doc, required=needed)
            add_switches(given, condition.name)
            known.add_argument(f"--own.{condition.name}", metavar="VALUE")
            add_switches(known, condition.name, "own.")


def run(args: argparse.Namespace) -> None:
    """Writes OUT/0000.png ... and OUT/grid.png, which begins with the images that went in."""
    task, values = TASKS[args.task], vars(args)
    images = [load_rgba(values[f"image.{name}"]) for name in task.images]
    given, known = (
        {name: values[own + name] for name in conditions.names() if values[own + name] is not None}
        for own in ("", "own.")
    )
    if "given" in task.needs and not given:
        raise ValueError(f"{args.task} needs what to change, as --palette or --caption")
    for prefix in ("", "own."):
        check_switches(args, prefix)
    settings = _settings(args, task)
    check_out(args)
    pipe = open_pipeline(args)
    for own, found in (("", given), ("own.", known)):
        for name in conditions.names():
            (value,) = switched(pipe, name, values, [f"{own}{name}"], own)
            found |= {} if value is None else {name: value}
    tools = load_tools(**named_tools(args))
    uses = pipe.uses(given)
    call = _call(pipe, images, known, uses, settings)
    call |= {"task": args.task, "tools": named_tools(args)}
    series = Series(args.out, call, FORMER)
    pictures = [Picture(pipe, image, tools=tools) for image in images]
    pictures[0] = Picture(pipe, images[0], known, tools)
    needed = {name: uses.pop(name) for name in task.needs if name in uses}
    if missing := series.missing(args.count):
        made = task.function(pipe, *pictures, given=uses, **needed, **settings)
        _tell_unused(args, pictures, known)
        for i in (i for part in missing for i in part):
            series.add(i, made[i])
    made = series.images(args.count)
    shown = np.concatenate([np.stack([picture.pixels for picture in pictures]), made])
    save_png(args.out / "grid.png", grid(shown, min(len(shown), 8)))
    record(args.out, [args.out / "grid.png"])
    print(f"{args.task}: {len(made)} images in {args.out}, see grid.png")


def _tell_unused(args: argparse.Namespace, pictures: list[Picture], known: dict[str, Any]) -> None:
    """Says which of what is known of the image, and which tools, the task did not ask for."""
    for name in known:
        if name not in pictures[0].asked:
            tell(f"--own.{name}", f"{args.task} did not ask for the image's {name}")
    taken = set().union(*(picture.taken for picture in pictures))
    tell_tools(args, taken, f"{args.task} took nothing from its images by it")


def _call(pipe: Pipeline, images, known, uses, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what the images are."""
    return {
        "model": describe_model(pipe.model),
        "guide": describe_model(pipe.guide) if pipe.guide else None,
        "size": pipe.size,
        "dtype": str(jnp.dtype(pipe.model.composer.dtype)),
        "precision": current_precision(),
        "images": [describe(image) for image in images],
        "own": {name: describe(value) for name, value in known.items()},
        **describe_uses(uses),
        **{name: describe(value) for name, value in settings.items()},
    }


def _settings(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """The options of the task and of sampling that were given, checked."""
    settings = {"count": args.count, "seed": args.seed, **sampling_options(args)}
    for name in task.options:
        value = getattr(args, name)
        settings[name] = read_region(value) if isinstance(value, Path) else value
    return {name: value for name, value in settings.items() if value is not None}
