"""`composer sweep --config FILE --out DIR`: trains and measures every run of a sweep; one table."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from composer_jax.cli import Parser
from composer_jax.commands import arguments, evaluate
from composer_jax.commands.prepare import share
from composer_jax.commands.unused import tell
from composer_jax.evaluation.sweeps import FAILED, MEASURED, TRAINED, Table, results
from composer_jax.models.files import read_json
from composer_jax.training.config import load_config
from composer_jax.training.sweep import Run, Sweep, load_sweep
from composer_jax.utils.atomic import check_writable, write_json, write_text
from composer_jax.utils.claims import read_claim

log = logging.getLogger("composer_jax")
TABLES = ("table.md", "table.csv", "table.html")
POOLS = "pools"  # in OUT: what sources are taken apart into, once for all runs
# what the share of this process is told by is not for the runs, each of which is a job alone
OURS = ("COMPOSER_PROCESS", "COMPOSER_PROCESSES")

take_rest = arguments.take_rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `--config.KEY=VALUE` is taken by `take_rest`."""
    parser.add_argument(
        "--config", required=True, type=arguments.text, help="ablations/NAME, or FILE.py"
    )
    parser.add_argument(
        "--out", required=True, type=arguments.folder, help="folder to write; resumes there"
    )
    parser.add_argument(
        "--jobs", type=arguments.whole(1, 1000), default=1, help="runs at a time (default 1)"
    )
    parser.add_argument("--list", action="store_true", help="print the runs, start nothing")
    parser.add_argument("--table", action="store_true", help="only write the table of what is done")
    parser.epilog = (
        "--config.KEY=VALUE sets a key of every run, for example --config.steps=100. Several "
        "processes share the runs where the environment says how many there are: COMPOSER_PROCESS "
        "and COMPOSER_PROCESSES, a SLURM array, an indexed Kubernetes job."
    )


def run(args: argparse.Namespace) -> int:
    """Runs what is not done, then writes OUT/table.md, table.csv and table.html.

    Returns 1 where a run failed, else 0.
    """
    sweep = load_sweep(args.config, args.overrides)
    for override in args.overrides:
        key = override.partition("=")[0]
        if all(override not in one.overrides or _sets_again(one, override) for one in sweep.runs):
            tell(f"--config.{key}", f"{sweep.name} sets it for every run")
    if args.list and args.table:
        raise ValueError("--list and --table are both given; one of them")
    if "--jobs" in args.typed and (args.list or args.table):
        tell("--jobs", "no run is started")
    index, count = share(os.environ)
    mine = [one for i, one in enumerate(sweep.runs) if i % count == index]
    if args.list:
        for one in mine:
            print(f"{one.folder}  {' '.join(one.overrides)}")
        return 0
    _check_evaluation(sweep)
    _keep(sweep, args.out)
    if not args.table:
        _run_all(sweep, mine, args.out, args.jobs)
    table = collect(sweep, args.out)
    texts = table.markdown(), table.csv(), table.html(sweep.name, sweep.doc)
    for name, text in zip(TABLES, texts, strict=True):
        write_text(args.out / name, text)  # other tasks may be writing it, too
    print(table.markdown())
    done = sum(bool(row) for row in table.runs.values())
    print(f"{done} of {len(sweep.runs)} runs are done; tables in {args.out}")
    return int(any(one for one in mine if (one.label, one.seed) in table.reasons))


def _sets_again(one: Run, override: str) -> bool:
    """Whether what comes after an override in a run has the same key."""
    later = one.overrides[one.overrides.index(override) + 1 :]
    return override.partition("=")[0] in {word.partition("=")[0] for word in later}


def _check_evaluation(sweep: Sweep) -> None:
    """Raises ValueError for words that `composer evaluate` would refuse after the first run, and
    for what the sweep says itself."""
    for word in map(str, sweep.evaluate):
        if word.partition("=")[0] in ("--out", "--model"):
            raise ValueError(f"{sweep.name}: evaluate has {word}, which the sweep sets itself")
    parser = Parser(prog="composer evaluate", allow_abbrev=False)
    evaluate.add_arguments(parser)
    try:
        evaluate.check(parser.parse_args(["--out", "out", *sweep.evaluate]))
    except ValueError as error:
        raise ValueError(f"{sweep.name}: evaluate {' '.join(sweep.evaluate)}: {error}") from None


def _keep(sweep: Sweep, out: Path) -> None:
    """Writes OUT/sweep.json; a sweep that goes on must hold the same runs, or more, and measure
    them alike: the tables are of all that is in OUT."""
    new = {one.folder: [sweep.config, *one.overrides] for one in sweep.runs}
    new["evaluate"] = list(sweep.evaluate)
    check_writable(out)
    path, old = out / "sweep.json", None
    try:
        old = read_claim(path)
    except ValueError:
        log.warning("%s is damaged; it is written again from what is asked now", path)
    if old is None and not path.exists():
        for name in TABLES:
            if (out / name).exists():
                raise ValueError(
                    f"{out} holds {name}, and there is no sweep.json, which says of which sweep; "
                    "give another --out"
                )
    old = old or {}
    for key, words in old.items():
        if key not in new:
            raise ValueError(f"{out} holds the run {key}, which {sweep.name} does not have; give "
                             "another --out")  # fmt: skip
        if new[key] != words:
            raise ValueError(f"{out} holds {key} as {words}, now it is {new[key]}; give another "
                             "--out")  # fmt: skip
    write_json(path, new)


def _run_all(sweep: Sweep, runs: list[Run], out: Path, jobs: int) -> None:
    """Trains and measures runs, `jobs` at a time; a failed one is marked and the rest finished."""
    waiting = [one for one in runs if not results(out / one.folder)]
    children: set[subprocess.Popen] = set()
    stopping = threading.Event()

    def stop(number, frame):
        del frame
        stopping.set()
        for child in list(children):
            child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run")
        with bar, ThreadPoolExecutor(jobs) as pool:
            for failed in pool.map(
                lambda one: _run(sweep, one, out / one.folder, children, stopping), waiting
            ):
                bar.update(not stopping.is_set())
                if failed:
                    bar.write(failed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping.is_set():
        raise KeyboardInterrupt


def _run(sweep: Sweep, one: Run, folder: Path, children: set, stopping: threading.Event) -> str:
    """Trains, then measures, one run in processes of their own; returns why it failed, or ""."""
    learn = ["train", "--config", sweep.config, "--workdir", folder / TRAINED]
    learn += [f"--config.pools={folder.parent / POOLS}"]
    learn += [f"--config.{word}" for word in one.overrides]
    measure = ["evaluate", "--model", folder / TRAINED, "--out", folder / MEASURED]
    folder.mkdir(parents=True, exist_ok=True)
    for words in (learn, [*measure, *sweep.evaluate]):
        if stopping.is_set():
            return ""
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "composer_jax", *map(str, words)],
                env={key: value for key, value in os.environ.items() if key not in OURS},
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C reaches it by us, once
            )
            children.add(child)
            if stopping.is_set():  # since it was asked above
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            children.discard(child)
        if stopping.is_set():
            return ""
        if code:
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
            reason = f"{words[0]} ended with {code}: {lines[-1][-300:] if lines else ''}"
            write_text(folder / FAILED, reason + "\n")
            return f"{one.folder}: {reason}"
        if words is learn and not _trained(sweep, one, folder):
            return f"{one.folder}: training was stopped before its end; the same command goes on"
    (folder / FAILED).unlink(missing_ok=True)
    return ""


def _trained(sweep: Sweep, one: Run, folder: Path) -> bool:
    """Whether the exported model is that of the last step: SIGTERM ends training well, too."""
    step = read_json(folder / TRAINED / "model" / "model.json")["step"]
    return step >= load_config(sweep.config, one.overrides).steps


def collect(sweep: Sweep, out: Path) -> Table:
    """What all runs of a sweep reached so far."""
    found: Mapping = {(one.label, one.seed): results(out / one.folder) for one in sweep.runs}
    reasons = {
        (one.label, one.seed): (out / one.folder / FAILED).read_text(errors="replace").strip()
        for one in sweep.runs
        if (out / one.folder / FAILED).is_file() and not found[one.label, one.seed]
    }
    return Table(found, reasons)
