"""How conditions work together: retention, leakage, conflict, strength and windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from composer_jax.evaluation import experiments
from composer_jax.evaluation.control import LEAST_ROOM, measure_each
from composer_jax.evaluation.experiments import Cell

LEAST_CONTROL = 0.1  # of a condition alone; with less there is nothing to retain

# of a cell: its samples, a list over seeds of uint8 [N, H, W, 3]
Get = Callable[[Cell], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Composition:
    """Shares of control, by condition or by (condition, the other).

    `retention[i, j]`: control of i given i and j over control given i alone. `leakage[i, j]`: what
    control of i loses when j is another example's. `conflict[i, j]`: control of i from one example
    where j is from another. `strength[i]`: mean measure at strengths 0, .25, .5, .75, 1, and
    `monotone[i]` Spearman's correlation of strength and mean measure. `windows[i][which]`: control
    where i is given in that half of sampling alone. Conditions with too little room between floor
    and oracle are left out, and from retention those that control nothing alone.
    """

    retention: dict[tuple[str, str], float] = field(default_factory=dict)
    leakage: dict[tuple[str, str], float] = field(default_factory=dict)
    conflict: dict[tuple[str, str], float] = field(default_factory=dict)
    strength: dict[str, list[float]] = field(default_factory=dict)
    monotone: dict[str, float] = field(default_factory=dict)
    windows: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types; pairs become "i | j"."""

        def plain(table: Mapping) -> dict:
            return {" | ".join(k) if isinstance(k, tuple) else k: v for k, v in table.items()}

        return {name: plain(table) for name, table in vars(self).items()}


def compose(
    names: Sequence[str],
    stored: Sequence[Mapping[str, Any]],
    oracle: np.ndarray,
    get: Get,
    wanted: Sequence[str],
    tools: Mapping[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> Composition:
    """Measures how conditions `names` work together, over the examples of `stored`.

    `oracle`: the examples' images through the codec. `get`: the samples of a cell for these
    examples. `wanted`: of `experiments.EXPERIMENTS`. `progress` is called after each measured cell.
    """
    found, count = Composition(), len(stored)
    own = {name: [row[name] for row in stored] for name in names}
    swapped = {
        name: [stored[experiments.other(i, count)][name] for i in range(count)] for name in names
    }

    def mean(name: str, cell: Cell) -> float:
        asked = swapped if name in cell.swapped else own
        scores = [measure_each(name, asked[name], seed, tools) for seed in get(cell)]
        progress(1)
        return float(np.nanmean(scores))

    floor = {name: mean(name, experiments.nothing()) for name in names}
    best = {name: float(np.nanmean(measure_each(name, own[name], oracle, tools))) for name in names}
    names = [name for name in names if best[name] - floor[name] >= LEAST_ROOM]
    alone = {name: mean(name, experiments.alone(name)) for name in names}

    def share(name: str, score: float) -> float:
        return (score - floor[name]) / (best[name] - floor[name])

    for a, b in itertools.combinations(names, 2) if {"pairs", "conflict"} & set(wanted) else ():
        both = {name: mean(name, experiments.pair(a, b)) for name in (a, b)}
        for i, j in ((a, b), (b, a)):
            if share(i, alone[i]) >= LEAST_CONTROL:
                found.retention[i, j] = (both[i] - floor[i]) / (alone[i] - floor[i])
        if "conflict" in wanted:
            apart = {name: mean(name, experiments.conflict(a, b)) for name in (a, b)}
            for i, j in ((a, b), (b, a)):
                found.leakage[i, j] = share(i, both[i]) - share(i, apart[i])
                found.conflict[i, j] = share(i, apart[i])
    for name in names:
        if "strength" in wanted:
            between = [
                mean(name, experiments.strength(name, amount)) for amount in experiments.STRENGTHS
            ]
            curve = [floor[name], *between, alone[name]]
            found.strength[name] = curve
            found.monotone[name] = float(spearmanr(range(len(curve)), curve).statistic)
        if "windows" in wanted:
            found.windows[name] = {
                which: share(name, mean(name, experiments.window(name, which)))
                for which in experiments.WINDOWS
            }
    return found


def measurements(names: Sequence[str], wanted: Sequence[str]) -> int:
    """How many cells `compose` measures at most."""
    n, pairs = len(names), len(names) * (len(names) - 1)
    count = 2 * n + pairs * (bool({"pairs", "conflict"} & set(wanted)) + ("conflict" in wanted))
    count += n * len(experiments.STRENGTHS) * ("strength" in wanted)
    return count + n * len(experiments.WINDOWS) * ("windows" in wanted)
