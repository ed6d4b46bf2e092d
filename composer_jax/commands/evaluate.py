"""`composer evaluate --model DIR --out DIR`: how far each condition controls samples, measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.commands import arguments
from composer_jax.commands.decompose import add_tool_arguments, named_tools
from composer_jax.commands.sample import (
    FORMER,
    add_sampling_arguments,
    check_out,
    open_pipeline,
    sampling_options,
)
from composer_jax.commands.unused import tell, tell_tools
from composer_jax.data.prepare import available
from composer_jax.data.sources import open_source
from composer_jax.data.stream import folders_of
from composer_jax.data.tools import load_tools
from composer_jax.diffusion import Use
from composer_jax.evaluation import experiments, page
from composer_jax.evaluation.composition import Composition, compose, measurements
from composer_jax.evaluation.control import (
    HEAD,
    TOO_NEAR,
    Control,
    degenerate,
    extract_all,
    measure_control,
    measure_each,
    reconstruct,
    remembering,
    tool_of,
)
from composer_jax.evaluation.experiments import EXPERIMENTS, Cell, Samples
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.evaluation.quality import effnet_features, quality
from composer_jax.evaluation.report import Report
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.series import describe_model
from composer_jax.utils.atomic import write_json, write_text
from composer_jax.utils.precision import current_precision
from composer_jax.utils.values import SEED, choice

CHUNK = 64

Load = Callable[[Cell], list[np.ndarray]]  # of a cell: its samples, for each seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--out", required=True, type=arguments.folder, help="folder to write; resumes there"
    )
    parser.add_argument(
        "--source",
        type=arguments.source,
        default="scenes",
        help="of the images (default: held-out scenes)",
    )
    parser.add_argument(
        "--source-seed",
        type=arguments.seed,
        default=0,
        help="of held-out scenes; of which images of another source, in which order (default 0)",
    )
    parser.add_argument(
        "--count", type=arguments.whole(2), default=256, help="images (default 256)"
    )
    parser.add_argument(
        "--seeds", type=arguments.count, default=4, help="samples of each image (default 4)"
    )
    parser.add_argument(
        "--few",
        type=arguments.whole(2),
        default=64,
        help="images for all but conditions alone (default 64)",
    )
    parser.add_argument(
        "--experiments",
        type=arguments.listed(partial(choice(*EXPERIMENTS).parse, "the value")),
        default=EXPERIMENTS,
        help=f"separated by commas (default: {','.join(EXPERIMENTS)})",
    )
    add_sampling_arguments(parser)
    add_tool_arguments(parser)


@dataclass(frozen=True)
class Examples:
    """Held-out images and what was taken out of them. `names`: the conditions that are given."""

    images: np.ndarray
    stored: list[dict[str, Any]]
    names: tuple[str, ...]
    reasons: Mapping[str, str]


def run(args: argparse.Namespace) -> None:
    """Writes OUT/control.json and OUT/report.html; samples that are in OUT are not made again."""
    wanted, options = args.experiments, check(args)
    check_out(args, *folders_of(args.source))
    pipe = open_pipeline(args)
    settings = _settings(args, pipe, options)
    samples = Samples(args.out, settings, FORMER)
    _tell_unused(args, pipe, wanted)
    if "windows" in wanted:
        for span in experiments.WINDOWS.values():
            pipe.check({pipe.names[0]: [Use(None, window=span)]}, **options)
    tools = pipe.tools(pipe.names) | load_tools(**named_tools(args))
    examples = _examples(args.source, args.source_seed, args.count, pipe, tools)
    world = args.source.partition(":")[0] == "scenes"
    judges = remembering(tools | (scenes_judges() if world else {}))
    measured, reasons = _measurable(examples, judges)
    load = _sample(args, pipe, examples, wanted, samples, options)
    through = reconstruct(pipe.model.vae, examples.images)
    controls, together = _measure_alone(examples, measured, load, through, judges)
    few = min(args.few, len(examples.images))
    with tqdm(total=measurements(measured, wanted), unit="cell", desc="measure") as bar:
        composition = compose(
            measured,
            examples.stored[:few],
            through[:few],
            lambda cell: [seed[:few] for seed in load(cell)],
            wanted,
            judges,
            bar.update,
        )
    numbers = {"images": len(examples.images), "seeds": args.seeds, "few": few}
    good = _quality(pipe, examples, load, through, judges) if "quality" in wanted else {}
    result = {
        "settings": settings | numbers,
        "control": {name: _plain(c) for name, c in controls.items()},
        "everything": together,
        "not measured": reasons,
        **composition.to_dict(),
        "quality": good,
    }
    write_json(args.out / "control.json", result)
    report = _report(settings | numbers, controls, together, composition, reasons, good)
    _pictures(report, examples, controls, load, judges)
    write_text(args.out / "report.html", report.html())
    _print(controls, together, composition, reasons, good)
    print(f"numbers in {args.out / 'control.json'}, pictures in {args.out / 'report.html'}")


def check(args: argparse.Namespace) -> dict[str, Any]:
    """The options of sampling; raises ValueError for options that do not go together."""
    SEED.check("the last seed, --seed + --seeds - 1,", args.seed + args.seeds - 1)
    return sampling_options(args)


def _tell_unused(args: argparse.Namespace, pipe: Pipeline, wanted: Sequence[str]) -> None:
    """Says which options change nothing of this evaluation."""
    exact = {"depth", "segmenter"} if args.source.partition(":")[0] == "scenes" else set()
    names = [name for name in pipe.names if conditions.get(name).tool not in exact]
    tell_tools(args, names, "nothing here is taken or measured by it")
    if "--few" in args.typed and not set(wanted) & set(experiments.FEW):
        tell("--few", f"it is for the experiments {', '.join(experiments.FEW)}")


def _settings(
    args: argparse.Namespace, pipe: Pipeline, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What samples depend on: other settings are other samples."""
    return {
        "model": describe_model(pipe.model),
        "source": args.source,
        "source seed": args.source_seed,
        "first seed": args.seed,
        "size": pipe.size,
        "dtype": str(jnp.dtype(pipe.model.composer.dtype)),
        "precision": current_precision(),
        **asdict(pipe.defaults.but(**options)),
    }


def _sample(
    args: argparse.Namespace,
    pipe: Pipeline,
    examples: Examples,
    wanted: Sequence[str],
    samples: Samples,
    options: Mapping[str, Any],
) -> Load:
    """Makes what is missing of all cells; returns what reads a cell's samples from disk."""

    def get(cell: Cell, progress: Callable[[int], Any]) -> list[np.ndarray]:
        count = min(args.few, len(examples.stored)) if cell.few else len(examples.stored)
        rows, seeds = examples.stored[:count], range(args.seed, args.seed + args.seeds)
        return [samples.get(pipe, rows, cell, seed, progress, **options) for seed in seeds]

    cells = experiments.cells(examples.names, wanted)
    count = len(examples.stored)
    total = sum(min(args.few, count) if cell.few else count for cell in cells) * args.seeds
    with tqdm(total=total, unit="image", desc="sample") as bar:
        for cell in cells:
            get(cell, bar.update)
    return lambda cell: get(cell, lambda done: None)


def _examples(
    text: str, seed: int, count: int, pipe: Pipeline, tools: Mapping[str, Any]
) -> Examples:
    """`count` images of a source, and the model's conditions as far as they can be taken."""
    if text == "scenes":
        text = f"scenes:{count}"
    source = open_source(text, size=pipe.size, seed=seed, split="test")
    drawn = source.drawn(count, seed)
    _check_count(text, len(drawn))
    reasons = {n: r for n, r in available(source, tools, pipe.names).items() if r}
    names = tuple(name for name in pipe.names if name not in reasons)
    if not names:
        raise ValueError(f"{text} gives none of the model's conditions: {reasons}")
    images, stored = [], []
    pipe.clip.cut.clear()
    for start in range(0, len(drawn), CHUNK):
        batch = source.batch(drawn[start : start + CHUNK])
        images.append(batch["image"])
        stored += extract_all(batch["image"], batch["given"], names, tools)
    pipe.clip.report_cut()
    source.tell()
    images = np.concatenate(images)
    _check_count(text, len(images))  # of which some could not be read
    return Examples(images, stored, names, reasons)


def _check_count(text: str, count: int) -> None:
    if count < 2:
        raise ValueError(f"{text} gives {count} images; at least 2 are wanted")


def _measurable(examples: Examples, judges: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The conditions whose measure has its tools, and why the others' has not."""
    measured, reasons = [], dict(examples.reasons)
    for name in examples.names:
        try:
            wanted = [row[name] for row in examples.stored]
            if np.isfinite(measure_each(name, wanted, examples.images, judges)).any():
                measured.append(name)
            else:
                reasons[name] = "its measure applies to none of these images"
        except ValueError as error:
            reasons[name] = str(error)
    return measured, reasons


def _measure_alone(
    examples: Examples,
    measured: Sequence[str],
    load: Load,
    through: np.ndarray,
    judges: Mapping[str, Any],
) -> tuple[dict[str, Control], dict[str, float | None]]:
    """Control of each condition alone, and the normalised one of each where all are given."""
    others = {"oracle": through, "image": examples.images, **degenerate(examples.images)}
    floor, every = load(experiments.nothing()), load(experiments.everything(examples.names))
    controls, together = {}, {}
    for name in tqdm(measured, unit="condition", desc="measure"):
        rows = {
            "sample": load(experiments.alone(name)),
            "floor": floor,
            "everything": every,
            **{kind: [images] for kind, images in others.items()},
        }
        controls[name] = measure_control(name, examples.stored, rows, judges)
        together[name] = controls[name].rows["everything"].normalised
    return controls, together


def _quality(
    pipe: Pipeline,
    examples: Examples,
    load: Load,
    through: np.ndarray,
    judges: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """Distances to the images of what was sampled given nothing, a caption, everything."""
    kinds = [experiments.nothing(), experiments.everything(examples.names)]
    if "caption" in examples.names:
        kinds.insert(1, experiments.alone("caption"))
    sets = {"oracle": [through], **{cell.name: load(cell) for cell in kinds}}
    features = {"CLIP": lambda images: np.asarray(pipe.clip.image(images))}
    if effnet := effnet_features():
        features["EffNet"] = effnet
    table = quality(examples.images, sets, features)
    if "reader" in judges:
        for name, seeds in {"real": [examples.images], **sets}.items():
            table[name]["certainty of shapes"] = judges["reader"].certainty(np.concatenate(seeds))
    return table


def _report(
    settings: Mapping[str, Any],
    controls: Mapping[str, Control],
    together: Mapping[str, float | None],
    composition: Composition,
    reasons: Mapping[str, str],
    good: Mapping[str, Mapping[str, float]],
) -> Report:
    """All but the pictures."""
    report = Report("Control, measured", ", ".join(f"{k} {v}" for k, v in settings.items()))
    page.control_section(report, controls, reasons)
    page.together_section(report, together)
    page.composition_section(report, tuple(controls), composition)
    page.quality_section(report, good)
    return report


def _plain(control: Control) -> dict[str, Any]:
    """As JSON's types; the score of each example beside the means."""
    return {
        "normalised": control.normalised,
        "interval": control.interval,
        "left out": control.left_out,
        "rows": {kind: asdict(row) for kind, row in control.rows.items()},
        "beside": control.beside,
        "scores": [None if np.isnan(score) else float(score) for score in control.scores],
    }


def _pictures(
    report: Report,
    examples: Examples,
    controls: Mapping[str, Control],
    load: Load,
    judges: Mapping[str, Any],
) -> None:
    """Best, median and worst of each condition."""
    report.heading("Pictures")
    for name, control in controls.items():
        wanted, samples = [row[name] for row in examples.stored], load(experiments.alone(name))[0]
        tool = tool_of(name, judges)
        page.picture_section(report, control, name, wanted, examples.images, samples, tool)


def _print(controls, together, composition: Composition, reasons, good) -> None:
    """The tables in the terminal."""
    _table(["alone", *HEAD[:6], "all given"], [
        [name, *control.cells()[:6], page.number(together[name])]
        for name, control in controls.items()
    ])  # fmt: skip
    _table(["measure of", *HEAD[6:]], [[n, *c.cells()[6:]] for n, c in controls.items()])
    for name, control in controls.items():
        if control.normalised is None:
            print(f"{name} has no control: {TOO_NEAR}")
    for name, reason in reasons.items():
        print(f"{name} is not measured: {reason}")
    if composition.retention:
        (i, j), worst = min(composition.retention.items(), key=lambda item: item[1])
        mean = np.mean(list(composition.retention.values()))
        print(f"retention in pairs: mean {mean:.3f}, least {worst:.3f} ({i} beside {j})")
    if composition.monotone:
        rows = [f"{name} {value:.2f}" for name, value in composition.monotone.items()]
        print(f"strength, Spearman: {', '.join(rows)}")
    if good:
        measures = list(dict.fromkeys(m for row in good.values() for m in row))
        rows = [[name, *(page.number(row.get(m)) for m in measures)] for name, row in good.items()]
        _table(["quality", *measures], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, *rows):
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  ".join([cells[0].ljust(widths[0]), *rest]))
    print()
