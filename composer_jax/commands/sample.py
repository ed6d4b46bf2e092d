"""`composer sample --CONDITION VALUE ... --out DIR`: images from any subset of conditions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.commands import arguments
from composer_jax.commands.arguments import setting
from composer_jax.commands.decompose import add_tool_arguments, named_tools
from composer_jax.commands.unused import check_conditions, check_switches, tell, tell_tools
from composer_jax.conditions.decompose import decompose, known_alpha
from composer_jax.conditions.image import fit_map, load_rgba, on_white
from composer_jax.data.tools import load_tools
from composer_jax.diffusion import SOLVERS, Use, use
from composer_jax.diffusion.grids import FINALS, SPACINGS
from composer_jax.evaluation.obedience import APART, obedience, pairs
from composer_jax.evaluation.pictures import grid, labelled_sheet
from composer_jax.evaluation.report import Report
from composer_jax.sampling.options import Options
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.series import Series, describe_model, describe_uses
from composer_jax.utils.atomic import check_writable, write_text
from composer_jax.utils.owned import check_not_read, record
from composer_jax.utils.png import save_png
from composer_jax.utils.precision import PRECISIONS, current_precision

DTYPES = ("float32", "bfloat16")
SHOWN = 64  # images in grid.png and in the report
# what calls did before there were these keys in call.json and evaluation.json
FORMER = {"precision": "default", **asdict(Options())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; those of conditions are generated from the registry."""
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder to write")
    parser.add_argument(
        "--from",
        dest="image",
        type=arguments.path,
        help="an image, of whose middle conditions are taken",
    )
    parser.add_argument(
        "--use", type=arguments.names, help="which conditions to take from it, separated by commas"
    )
    parser.add_argument(
        "--count", type=arguments.count, default=4, help="how many images (default 4)"
    )
    parser.add_argument(
        "--report", action="store_true", help="measure how images obey; report.html"
    )
    parser.add_argument(
        "--previews", type=arguments.count, metavar="K", help="OUT/previews, every K evaluations"
    )
    add_sampling_arguments(parser)
    add_tool_arguments(parser)
    for name in conditions.names():
        group = parser.add_argument_group(name, conditions.get(name).doc)
        group.add_argument(f"--{name}", metavar="VALUE")
        add_switches(group, name)
        group.add_argument(f"--{name}.strength", type=arguments.share, metavar="0..1", default=1.0)
        group.add_argument(
            f"--{name}.window", type=arguments.span, metavar="START:END", default=(0, 1)
        )
        group.add_argument(f"--{name}.scale", type=arguments.setting("guidance"), metavar="WEIGHT")
        group.add_argument(
            f"--{name}.region", type=arguments.path, metavar="PNG", help="white where it acts"
        )
        group.add_argument(f"--{name}.negative", metavar="VALUE", help="to move away from")


def add_program_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and of how it is sampled what compiles a program of its own."""
    parser.add_argument(
        "--model",
        type=arguments.text,
        help="model directory or training workdir (default: bundled)",
    )
    parser.add_argument("--guide", type=arguments.text, help="a weaker model, for --autoguidance")
    parser.add_argument(
        "--size", type=arguments.size, help="of the images in pixels (default: the model's)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="(default: bfloat16 on accelerators, float32 on CPU)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of products of float32: by default TF32 on GPUs and one pass of bfloat16 on TPUs; "
        "highest keeps float32",
    )
    parser.add_argument("--batch", type=setting("batch"), help="images at a time")
    parser.add_argument(
        "--steps", type=setting("steps"), help="solver steps (default: the model's)"
    )
    parser.add_argument("--solver", choices=SOLVERS, help="(default: the model's)")
    parser.add_argument("--eta", type=setting("eta"), help="noise of solver ddim, 0 to 1")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and how it is sampled: the fields of `Options`."""
    add_program_arguments(parser)
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="image i depends on seed and i alone"
    )
    parser.add_argument("--spacing", choices=SPACINGS, help="of the grid of times")
    parser.add_argument(
        "--steps-offset", type=setting("steps_offset"), help="of leading spacing: its last step"
    )
    parser.add_argument("--final", choices=FINALS, help="noise that the grid ends at")
    parser.add_argument(
        "--shift", type=setting("shift"), help="of the flow schedule's times, above 1 to noise"
    )
    parser.add_argument("--guidance", type=setting("guidance"), help="guidance weight, 1 for none")
    parser.add_argument(
        "--interval", type=setting("interval"), metavar="START:END", help="where guidance acts"
    )
    parser.add_argument(
        "--rescale", type=setting("rescale"), help="guidance's contrast taken back, 0 to 1"
    )
    parser.add_argument(
        "--autoguidance", type=setting("autoguidance"), help="weight against the guide, 1 for none"
    )


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """The model that those arguments name."""
    pipe = Pipeline.load(args.model, args.dtype, args.guide, args.size)
    if args.guide and "autoguidance" in args:
        weight = args.autoguidance
        if (pipe.defaults.autoguidance if weight is None else weight) == 1.0:
            tell("--guide", "--autoguidance is 1, none; give a weight")
    return pipe


def check_out(args: argparse.Namespace, *inputs: str | Path) -> None:
    """Raises ValueError where OUT is a model's folder or one of `inputs`, and as `check_writable`
    does."""
    check_not_read(args.out, [*filter(None, (args.model, args.guide)), *inputs])
    check_writable(args.out)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What those arguments say, None where nothing; wrong values are refused here."""
    names = [f.name for f in fields(Options) if f.name != "start"]
    options = {name: getattr(args, name, None) for name in names}
    if options["autoguidance"] not in (None, 1.0) and not args.guide:
        raise ValueError("--autoguidance needs --guide, a weaker model of the same conditions")
    Options(solver="ddim").but(**options | {"solver": options["solver"] or "ddim"})
    return options


def run(args: argparse.Namespace) -> None:
    """Writes OUT/0000.png ... and OUT/grid.png; images of the same call are not made again."""
    if bool(args.image) != bool(args.use):
        raise ValueError("--from IMAGE and --use CONDITIONS go together")
    wanted = list(args.use or ())
    check_conditions(args, wanted)
    check_switches(args)
    options = sampling_options(args)
    check_out(args)
    rgba = load_rgba(args.image) if args.image else None
    pipe = open_pipeline(args)
    tools = load_tools(**named_tools(args))
    uses = pipe.uses(_given(args, pipe, rgba, wanted, tools))
    pipe.check(uses, seed=args.seed, **options)
    measured = uses if args.report else ()
    tell_tools(args, {*wanted, *measured}, "it takes nothing from an image here, for --use or "
               "--report")  # fmt: skip
    series = Series(args.out, _call(args, pipe, uses, options), FORMER)
    failed: list[OSError] = []
    preview = _preview(series, failed) if args.previews else None
    missing = series.missing(args.count)
    if args.previews and not missing:
        tell("--previews", "all images are there, none is made")
    parts = [
        (part, pipe.stream(uses, count=part.stop, first=part.start, seed=args.seed,
                           preview=preview, every=args.previews, **options))
        for part in missing
    ]  # fmt: skip
    done = args.count - sum(map(len, missing))
    bar = {"total": args.count, "initial": done, "unit": "image", "disable": args.count < 2}
    with tqdm(**bar) as progress:
        for part, images in parts:
            for i, image in zip(part, images, strict=True):
                if failed:
                    raise failed[0]
                series.add(i, image)
                progress.update()
    shown = series.images(min(args.count, SHOWN))
    save_png(args.out / "grid.png", grid(shown, min(len(shown), 8)))
    previews = (args.out / "previews").glob("*.png") if args.previews else ()
    record(args.out, [args.out / "grid.png", *previews])
    print(f"{args.count} images given {', '.join(uses) or 'nothing'} in {args.out}, see grid.png")
    if args.report:
        _report(args, pipe, uses, shown, options, tools)


def _given(
    args: argparse.Namespace,
    pipe: Pipeline,
    rgba: np.ndarray | None,
    wanted: list[str],
    tools: Mapping[str, Any],
) -> dict[str, list[Use]]:
    """The uses that the command line asks for, of the image `rgba` and of values."""
    given: dict[str, Any] = {}
    if rgba is not None:
        tools = pipe.tools(wanted) | tools
        known = {n: fit_map(a, (pipe.size,) * 2, "area") for n, a in known_alpha(rgba).items()}
        image = pipe.fit_image(on_white(rgba))
        given |= decompose(image, only=wanted, given=known, tools=tools)
    options = vars(args)
    uses: dict[str, list[Use]] = {}
    for name in conditions.names():
        value, away = switched(pipe, name, options, (name, f"{name}.negative"))
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
    return uses


def _call(args, pipe: Pipeline, uses: dict[str, list[Use]], options: dict[str, Any]) -> dict:
    """Everything that decides what the images are, but their count."""
    return {
        "model": describe_model(pipe.model),
        "guide": describe_model(pipe.guide) if pipe.guide else None,
        "size": pipe.size,
        "dtype": str(jnp.dtype(pipe.model.composer.dtype)),
        "precision": current_precision(),
        "seed": args.seed,
        **describe_uses(uses),
        **asdict(pipe.defaults.but(**options)),
    }


def _preview(series: Series, failed: list[OSError]) -> Callable[[int, np.ndarray], None]:
    """Writes OUT/previews/STEP.png; what the system refuses goes into `failed`, as no error may
    leave what a compiled program calls."""

    def look(step: int, images: np.ndarray) -> None:
        try:
            series.begin()
            save_png(series.out / "previews" / f"{step:04d}.png", grid(images, min(len(images), 8)))
        except OSError as error:
            failed.append(error)

    return look


def _report(
    args,
    pipe: Pipeline,
    uses,
    images: np.ndarray,
    options: dict[str, Any],
    tools: Mapping[str, Any],
) -> None:
    """OUT/report.html: each image, its conditions as wanted and as taken out of it again."""
    tools = pipe.tools(tuple(uses)) | tools
    found = obedience(uses, images, tools)
    page = Report("How the images obey", f"{len(images)} images, {args.out}")
    table = []
    for one in found:
        scores = one.scores[np.isfinite(one.scores)]
        if len(scores):
            table.append([one.name, *(f"{f(scores):.3f}" for f in (np.mean, np.min, np.max))])
            print("{:10} mean {}  worst {}  best {}".format(*table[-1]))
        else:
            print(f"{one.name:10} not measured: {one.reason or 'its measure does not apply here'}")
    page.text("Each condition by its own measure; 1 is perfect.")
    page.table(["condition", "mean", "worst", "best"], table)
    names = [name for name in uses if any(not one.negative for one in uses[name])]
    if len(names) > 1:
        rows = pairs(*pipe.conflict(uses, seed=args.seed, **options))
        page.heading("Conflict")
        page.text("Cosines between directions of guidance; below 0, two conditions pull apart.")
        cells = [[f"{a} and {b}", *(f"{cosine:.2f}" for cosine in rest)] for a, b, *rest in rows]
        page.table(["conditions", "early", "late", "mean"], cells)
        for a, b, _, _, mean in rows:
            if mean < APART:
                print(f"{a} and {b} pull apart (cosine {mean:.2f})")
    page.heading("Images")
    for i, image in enumerate(images):
        row = {"image": image}
        for one in found:
            condition = conditions.get(one.name)
            row[f"{one.name}, wanted"] = condition.render(one.use.value)
            if one.got[i] is not None:
                row[f"{one.name}, got"] = condition.render(one.got[i])
        scores = ", ".join(f"{one.name} {one.scores[i]:.3f}" for one in found if len(one.scores))
        page.picture(labelled_sheet([row], 128), scores or f"image {i}")
    write_text(args.out / "report.html", page.html())
    print(f"wanted and got beside each other in {args.out / 'report.html'}")


def add_switches(group: Any, name: str, prefix: str = "") -> None:
    """Adds what a condition's `parse` may be told, as flags."""
    for switch, text in conditions.get(name).switches.items():
        group.add_argument(f"--{prefix}{name}.{switch}", action="store_true", help=text)


def switched(
    pipe: Pipeline, name: str, options: Mapping[str, Any], keys: Sequence[str], prefix: str = ""
) -> list[Any]:
    """The values of a condition under some of the `options`, read as its switches say."""
    condition, values = conditions.get(name), [options[key] for key in keys]
    on = {s: True for s in condition.switches if options[f"{prefix}{name}.{s}"]}
    if not on:
        return values
    tool = pipe.tool(name)
    return [None if value is None else condition.parse(value, tool, **on) for value in values]


def read_region(path: str) -> np.ndarray:
    """A picture as float32 [H, W] in [0, 1]: white where a use acts, not what is transparent."""
    return conditions.load_region(path)
