"""What runs of a sweep reached: one table, with means and intervals over seeds."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from composer_jax.evaluation.report import Report
from composer_jax.storage.metrics import read_metrics

log = logging.getLogger("composer_jax")
TRAINED, MEASURED, FAILED = "run", "evaluation", "failed.txt"  # in the folder of a run


def results(folder: Path) -> dict[str, float]:
    """Everything that one run reached, by measure; {} where it is not done.

    Control of each condition alone and their mean, with all given, retention over pairs; the last
    loss and held-out loss, and the median of images a second, of its log.
    """
    path = folder / MEASURED / "control.json"
    if not path.is_file():
        return {}
    try:
        row = _measured(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); the run counts as not measured", path, error)
        return {}
    lines = read_metrics(folder / TRAINED / "metrics.jsonl")
    for key in ("loss", "held_out_loss"):
        values = [line[key] for line in lines if key in line]
        if values:
            row[key.replace("_", " ")] = values[-1]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    if rates:
        row["images/s"] = float(np.median(rates))
    return row


def _measured(found: dict) -> dict[str, float]:
    """Control, as control.json has it."""
    alone = {name: row["normalised"] for name, row in found["control"].items()}
    row = {name: value for name, value in alone.items() if value is not None}
    row["mean"] = float(np.mean(list(row.values()))) if row else float("nan")
    every = [value for value in found["everything"].values() if value is not None]
    row["all given"] = float(np.mean(every)) if every else float("nan")
    if found["retention"]:
        row["retention"] = float(np.mean(list(found["retention"].values())))
    return row


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean by Student's t; nan for one value."""
    if len(values) < 2:
        return float("nan")
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * spread)


class Table:
    """Rows by label, measures by column, from (label, seed) -> what a run reached.

    A run that failed or is not done has the row {}; `reasons` says why, by (label, seed).
    """

    def __init__(
        self,
        runs: Mapping[tuple[str, int], Mapping[str, float]],
        reasons: Mapping[tuple[str, int], str],
    ):
        self.runs, self.reasons = runs, reasons
        self.labels = list(dict.fromkeys(label for label, _ in runs))
        self.measures = list(dict.fromkeys(m for row in runs.values() for m in row))

    def values(self, label: str, measure: str) -> list[float]:
        """One for each seed that is done."""
        rows = (row for (other, _), row in self.runs.items() if other == label)
        return [row[measure] for row in rows if measure in row]

    def cell(self, label: str, measure: str) -> str:
        """Mean and half of its interval."""
        values = self.values(label, measure)
        if not values:
            return "-"
        digits = 0 if measure == "images/s" else 4 if "loss" in measure else 3
        half = interval(values)
        around = f" ± {half:.{digits}f}" if np.isfinite(half) else ""
        return f"{np.mean(values):.{digits}f}{around}"

    def rows(self) -> list[list[str]]:
        """A row for each label: its name, seeds that are done, a cell for each measure."""
        done = {
            label: sum(bool(row) for (other, _), row in self.runs.items() if other == label)
            for label in self.labels
        }
        return [
            [label, str(done[label]), *(self.cell(label, m) for m in self.measures)]
            for label in self.labels
        ]

    @property
    def head(self) -> list[str]:
        """Of `rows`."""
        return ["run", "seeds", *self.measures]

    def markdown(self) -> str:
        """The table, and what failed."""
        lines = [self.head, ["---"] * len(self.head), *self.rows()]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
        for (label, seed), reason in self.reasons.items():
            text += f"\n{label}, seed {seed}: {reason}\n"
        return text

    def csv(self) -> str:
        """A line for each run, unrounded."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "seed", "state", *self.measures])
        for (label, seed), row in self.runs.items():
            state = "done" if row else self.reasons.get((label, seed), "not done")
            writer.writerow([label, seed, state, *(row.get(m, "") for m in self.measures)])
        return file.getvalue()

    def html(self, title: str, doc: str) -> str:
        """The table and a plot for each measure, the mean of each label and its interval."""
        page = Report(title, f"{len(self.runs)} runs; means and 95 % intervals over seeds")
        page.code(doc.strip())
        page.table(self.head, self.rows())
        for (label, seed), reason in self.reasons.items():
            page.text(f"{label}, seed {seed}: {reason}")
        for measure in self.measures:
            values = {label: self.values(label, measure) for label in self.labels}
            means = {label: float(np.mean(v)) for label, v in values.items() if v}
            if not means or "loss" in measure or measure == "images/s":
                continue
            halves = {label: interval(values[label]) for label in means}
            spans = {
                label: (means[label] - half, means[label] + half)
                for label, half in halves.items()
                if np.isfinite(half)
            }
            page.heading(measure)
            page.bars(means, f"{measure}, normalised control", spans)
        return page.html()
