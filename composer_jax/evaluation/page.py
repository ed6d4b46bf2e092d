"""The page of an evaluation: numbers, and for each condition the pictures behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.evaluation.composition import Composition
from composer_jax.evaluation.control import HEAD, KNOWN, TOO_NEAR, Control
from composer_jax.evaluation.experiments import STRENGTHS
from composer_jax.evaluation.obedience import taken_out
from composer_jax.evaluation.pictures import labelled_sheet
from composer_jax.evaluation.report import Report

CELL = 128  # pixels of a picture


def control_section(page: Report, controls: Mapping[str, Control], reasons: Mapping) -> None:
    """Normalised control as bars, and the table behind it."""
    page.heading("Control of each condition, given alone")
    page.text(
        "A condition is taken out of the sample again and compared with what was asked. Control is "
        "the excess over chance, normalised: 0 is the same model without the condition, 1 the "
        "image itself through the codec. Chance is what the same images score for other examples' "
        "conditions, so that nothing which does not depend on the condition scores above 0. None "
        f"is given where {TOO_NEAR}."
    )
    shown = {name: c for name, c in controls.items() if c.normalised is not None}
    values = {name: c.normalised for name, c in shown.items()}
    page.bars(values, "Normalised control", {name: c.interval for name, c in shown.items()})
    page.table(["condition", *HEAD], [[name, *c.cells()] for name, c in controls.items()])
    page.text(
        "Raw measures under each kind of image: samples given the condition, given another "
        "example's, given nothing (floor); the image through the codec (oracle) and as it is; and "
        "images that know nothing. Their control, normalised alike:"
    )
    kinds = [kind for kind in HEAD[2:-1] if kind not in KNOWN]
    rows = [
        [name, *(number(c.rows[kind].normalised) if kind in c.rows else "" for kind in kinds)]
        for name, c in shown.items()
    ]
    page.table(["condition", *kinds], rows)
    for name, c in controls.items():
        if c.beside:
            columns = list(next(iter(c.beside.values())))
            page.table(
                [name, *columns],
                [[title, *(number(row[k]) for k in columns)] for title, row in c.beside.items()],
            )
    for name, reason in reasons.items():
        page.text(f"Not measured, {name}: {reason}.")


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def together_section(page: Report, together: Mapping[str, float | None]) -> None:
    """Normalised control where all conditions are given."""
    page.heading("Everything given")
    page.bars({k: v for k, v in together.items() if v is not None}, "Normalised control")


def picture_section(
    page: Report,
    control: Control,
    name: str,
    wanted: Sequence[Any],
    images: np.ndarray,
    samples: np.ndarray,
    tool: Any,
) -> None:
    """Best, median and worst of one condition: wanted, sample, taken out again."""
    condition = conditions.get(name)
    order = [i for i in np.argsort(-control.scores) if np.isfinite(control.scores[i])]
    if not order:
        return
    rows = []
    for i in (order[0], order[len(order) // 2], order[-1]):
        row = {"image": images[i], "wanted": condition.render(wanted[i]), "sample": samples[i]}
        again = taken_out(condition, samples[i], tool)
        if again is not None:
            row["taken out again"] = condition.render(again)
        rows.append(row)
    scores = ", ".join(
        f"{word} {control.scores[i]:.3f}"
        for word, i in zip(
            ("best", "median", "worst"),
            (order[0], order[len(order) // 2], order[-1]),
            strict=True,
        )
    )
    page.picture(labelled_sheet(rows, CELL), f"{name}: {scores}, under the first seed")


def composition_section(page: Report, names: Sequence[str], found: Composition) -> None:
    """Pairs, conflicts, strengths and windows."""
    if found.retention:
        page.heading("Pairs")
        page.text(
            "Retention: how much of the row's control stays when the column is given, too, of the "
            "same example."
        )
        page.heat(names, found.retention)
    if found.conflict:
        page.heading("Conflict")
        page.text("Control of the row where the column is of another example.")
        page.heat(names, found.conflict)
        page.text("Leakage: what the row's control loses when the column changes to another's.")
        page.heat(names, {pair: 1.0 - value for pair, value in found.leakage.items()})
        page.text("Shown as 1 - loss, so that 1 is no leakage.")
    if found.strength:
        page.heading("Strength")
        page.text(
            "The mean measure by strength; Spearman's correlation: "
            + ", ".join(f"{name} {value:.2f}" for name, value in found.monotone.items())
            + "."
        )
        page.plot([0, *STRENGTHS, 1], found.strength, "Measure by strength")
    if found.windows:
        page.heading("Windows")
        page.text("Control of a condition given in one half of sampling alone.")
        kinds = list(next(iter(found.windows.values())))
        rows = [[n, *(number(row[k]) for k in kinds)] for n, row in found.windows.items()]
        page.table(["condition", *kinds], rows)


def quality_section(page: Report, table: Mapping[str, Mapping[str, float]]) -> None:
    """Distances between sets of samples and the images."""
    if not table:
        return
    page.heading("Quality")
    page.text(
        "Distances of samples to the images, by frozen features: KID and CMMD are fair at any "
        "number, FD (Frechet's distance, by the features in its name) only beside others at the "
        "same number. Real: one half of the images against the other. Diversity: mean distance "
        "between seeds. CLIP is the model's own, which also conditions."
    )
    columns = list(dict.fromkeys(measure for row in table.values() for measure in row))
    rows = [[name, *(number(row.get(m)) for m in columns)] for name, row in table.items()]
    page.table(["", *columns], rows)
