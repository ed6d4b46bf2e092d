"""`composer quickstart`: photos come apart, a model trains, the bundled one obeys; a report."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.commands import arguments
from composer_jax.conditions.decompose import decompose
from composer_jax.data.sources import open_source
from composer_jax.data.tools import load_tools
from composer_jax.diffusion import Use
from composer_jax.evaluation.control import (
    HEAD,
    degenerate,
    extract_all,
    measure_control,
    reconstruct,
    sample_each,
)
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.evaluation.pictures import labelled_sheet
from composer_jax.evaluation.report import Report
from composer_jax.models.files import read_json
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.metrics import read_metrics
from composer_jax.training.config import load_config
from composer_jax.utils.atomic import check_writable, write_text

PHOTOS = ("astronaut", "cat", "coffee", "rocket")
PAIRS = (("sketch", "palette"), ("depth", "palette"), ("caption", "depth"))
MARK = "quickstart.txt"  # in a run that may be removed
SHOWN, COUNT = 6, 16  # scenes in pictures, scenes in numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--out", type=arguments.folder, default="quickstart", help="folder to write"
    )
    parser.add_argument(
        "--config", type=arguments.text, default="scenes64:quick", help="what to train"
    )


def run(args: argparse.Namespace) -> None:
    """Decompose, train with an interruption, sample, report: writes OUT/report.html."""
    start = time.perf_counter()
    workdir, path = args.out / "run", args.out / "report.html"
    if (task := load_config(args.config).task) != "composer":
        raise ValueError(f"{args.config} trains a {task}; quickstart is for composers")
    check_writable(args.out)
    for one in (workdir, path):
        if one.exists() and not (workdir / MARK).is_file():
            raise ValueError(f"{one} is no earlier quickstart's; give another --out")
    report = Report("Composer in JAX: quickstart", "Every number below was computed in this run.")
    print("1/3  photos come apart")
    photos(report)
    print("2/3  a composer trains; it is interrupted half-way and resumed")
    resumed_at = train_with_interruption(args.config, workdir)
    curve(report, workdir, resumed_at)
    print("3/3  held-out scenes come back from their conditions, by the bundled composer")
    control(report, Pipeline.load())
    advice(report, workdir)
    minutes = (time.perf_counter() - start) / 60
    report.text(f"This run took {minutes:.1f} minutes.")
    write_text(path, report.html())
    print(f"done in {minutes:.1f} minutes; open {path}")


def photos(report: Report) -> None:
    """Decomposes scikit-image's photos into a contact sheet."""
    import skimage.data

    tools, rows, reasons = load_tools(clip="bundled"), [], {}
    for name in tqdm(PHOTOS, unit="photo"):
        photo = conditions.load_image(getattr(skimage.data, name)())
        stored = decompose(photo, tools=tools, skipped=reasons.__setitem__)
        rows.append({"image": photo} | {n: conditions.get(n).render(v) for n, v in stored.items()})
    report.heading("Photos, taken apart")
    report.text(
        "Each column is one factor of the image. A composer is trained to put images back together "
        "from any subset of them."
    )
    report.picture(labelled_sheet(rows, 150), "Photos of scikit-image and their conditions.")
    for name, reason in reasons.items():
        report.text(f"Not shown, {name}: {reason}.")


def train_with_interruption(config: str, workdir: Path) -> int:
    """Runs `composer train`, stops it with SIGTERM half-way, runs it again; the step it resumed at.

    Raises ValueError where training fails.
    """
    write_text(workdir / MARK, "A run of composer quickstart, which the next one goes on with.\n")
    command = [sys.executable, "-m", "composer_jax", "train", "--config", config]
    command += ["--workdir", str(workdir)]
    if found := metrics(workdir):  # of an earlier quickstart
        print(f"     found at step {found[-1]['step']}, now resumed")
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
            raise ValueError("training ended with an error, see above")
        return found[-1]["step"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while first.poll() is None:
        if len(metrics(workdir)) >= 2 and metrics(workdir)[-1]["step"] >= _steps(workdir) // 2:
            first.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    if first.wait() != 0:
        raise ValueError("training ended with an error, see above")
    stopped = metrics(workdir)[-1]["step"]
    print(f"     stopped by SIGTERM at step {stopped}, now resumed")
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
        raise ValueError("training ended with an error after it was resumed, see above")
    return stopped


def metrics(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl so far."""
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def _steps(workdir: Path) -> int:
    return read_json(workdir / "config.json")["steps"]


def curve(report: Report, workdir: Path, resumed_at: int) -> None:
    """The loss as a plot."""
    rows = metrics(workdir)
    report.heading("Training")
    rate = np.median([row["images_per_second"] for row in rows])
    report.text(
        f"{rows[-1]['step']} steps at {rate:.0f} images/s. At step {resumed_at} the run was "
        "stopped by SIGTERM, saved its state and was started again."
    )
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    name = "Loss by step; the dashed line is where the run was resumed."
    report.plot(steps, losses, name, [resumed_at])


def control(report: Report, pipe: Pipeline) -> None:
    """Samples held-out scenes from single conditions and pairs; pictures and numbers."""
    source = open_source(f"scenes:{COUNT}", size=pipe.size, split="test")
    batch = source.batch(range(COUNT))
    images, given = batch["image"], batch["given"]
    tools = pipe.tools(pipe.names) | scenes_judges()
    stored = extract_all(images, given, pipe.names, tools)
    kinds = [(), *[(name,) for name in pipe.names], *PAIRS, pipe.names]
    kinds = [kind for kind in kinds if set(kind) <= set(pipe.names)]
    samples = {}
    with tqdm(total=len(kinds) * COUNT, unit="image") as bar:
        for kind in kinds:
            uses = {name: Use(None) for name in kind}
            samples[kind] = sample_each(pipe, stored, uses, steps=10, progress=bar.update)
    rows = []
    for i in range(SHOWN):
        row = {"scene": images[i]}
        for kind in kinds:
            if len(kind) == 1:
                row[kind[0]] = conditions.get(kind[0]).render(stored[i][kind[0]])
                row[f"from {kind[0]}"] = samples[kind][i]
        rows.append(row)
    report.heading("Held-out scenes, from one condition")
    report.text("Beside each condition, a sample of the bundled composer that was given it alone.")
    report.picture(labelled_sheet(rows, 96), "Scenes the model never saw.")
    rows = [
        {"scene": images[i]}
        | {_title(kind, pipe): samples[kind][i] for kind in kinds if len(kind) != 1}
        for i in range(SHOWN)
    ]
    report.heading("From nothing, from pairs, from everything")
    report.picture(labelled_sheet(rows, 150), "The same scenes.")
    report.heading("Control")
    report.text(
        "The condition is taken out of the sample again and compared with what was asked; 1 is "
        f"perfect. {COUNT} held-out scenes, one seed, 10 steps. Floor: samples without it. "
        "Permuted: samples given another scene's. Oracle: the scene through the codec. Caption, "
        "depth and instances are read by networks of their own, semantics by the CLIP that also "
        "conditions. `composer evaluate` measures much more."
    )
    through, table = reconstruct(pipe.model.vae, images), []
    for name in pipe.names:
        rows = {"sample": [samples[(name,)]], "floor": [samples[()]], "oracle": [through]}
        rows |= {"image": [images], **{k: [v] for k, v in degenerate(images).items()}}
        table.append([name, *measure_control(name, stored, rows, tools).cells()])
    report.table(["condition", *HEAD], table)
    for name, control, _, sample, _, floor, *_ in table:
        print(f"     {name:10} control {control}  measure {sample}  without {floor}")


def _title(kind: tuple[str, ...], pipe: Pipeline) -> str:
    if kind == pipe.names:
        return "everything"
    return " + ".join(kind) or "nothing"


def advice(report: Report, workdir: Path) -> None:
    """What to do next."""
    report.heading("What next")
    report.text(
        "The pictures above are the bundled composer's, which was trained as the first line says; "
        "the run of this quickstart is two minutes old. Sample from either, train on your photos:"
    )
    mine = "--config scenes64:cpu --config.source=folder:PHOTOS --workdir runs/mine"
    report.code(
        "composer train --config scenes64:cpu --workdir runs/scenes64\n"
        "composer sample --caption 'a red cone' --out samples\n"
        f"composer sample --model {workdir} --caption 'a red cone' --out young\n"
        f"composer train {mine}\n"
        "composer decompose PHOTO.jpg --out conditions"
    )
