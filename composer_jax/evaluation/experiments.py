"""What is sampled to measure control: cells, each a way to give conditions, kept on disk."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.diffusion import Use
from composer_jax.evaluation.control import sample_each
from composer_jax.models.files import read_json
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.utils.atomic import write_json

CALL = "evaluation.json"
PART = 64  # images a file
EXPERIMENTS = ("alone", "pairs", "conflict", "strength", "windows", "quality")
FEW = ("pairs", "conflict", "strength", "windows")  # those that are made of the first examples
STRENGTHS = (0.25, 0.5, 0.75)  # 0 is the floor and 1 the condition alone
WINDOWS = {"early": (0.0, 0.5), "late": (0.5, 1.0)}


@dataclass(frozen=True)
class Cell:
    """A way to give conditions: `uses` by condition; those in `swapped` are another example's.

    `few`: of the first examples only.
    """

    name: str
    uses: Mapping[str, Use]
    swapped: tuple[str, ...] = ()
    few: bool = True


def nothing() -> Cell:
    """The floor: no condition at all."""
    return Cell("nothing", {}, few=False)


def alone(name: str) -> Cell:
    """One condition."""
    return Cell(f"alone {name}", {name: Use(None)}, few=False)


def everything(names: Sequence[str]) -> Cell:
    """All conditions."""
    return Cell("everything", {name: Use(None) for name in names}, few=False)


def pair(a: str, b: str) -> Cell:
    """Two conditions of one example."""
    return Cell(f"pair {a}+{b}", {a: Use(None), b: Use(None)})


def conflict(a: str, b: str) -> Cell:
    """One example's `a` with another's `b`."""
    return Cell(f"conflict {a}+{b}", {a: Use(None), b: Use(None)}, swapped=(b,))


def strength(name: str, amount: float) -> Cell:
    """One condition, less strongly."""
    return Cell(f"strength {name} {amount:g}", {name: Use(None, strength=amount)})


def window(name: str, which: str) -> Cell:
    """One condition in one half of sampling."""
    return Cell(f"window {name} {which}", {name: Use(None, window=WINDOWS[which])})


def cells(names: Sequence[str], experiments: Sequence[str]) -> list[Cell]:
    """All cells of those experiments over conditions `names`, "alone" always among them."""
    found = [nothing(), *map(alone, names), everything(names)]
    pairs = list(itertools.combinations(names, 2))
    if "pairs" in experiments or "conflict" in experiments:  # leakage compares these two
        found += [pair(a, b) for a, b in pairs]
    if "conflict" in experiments:
        found += [conflict(a, b) for a, b in pairs]
    if "strength" in experiments:
        found += [strength(name, amount) for name in names for amount in STRENGTHS]
    if "windows" in experiments:
        found += [window(name, which) for name in names for which in WINDOWS]
    return found


def other(i: int, count: int) -> int:
    """The example that a swapped condition is taken from: the other one of a pair."""
    return i ^ 1 if i ^ 1 < count else max(i - 1, 0)


class Samples:
    """Samples of cells in `folder`, in parts of `PART` images; what is there is not made again.

    `call`: everything that decides what the images are but their numbers, as JSON's types. Raises
    ValueError, naming what differs, where the folder holds those of another evaluation.
    """

    def __init__(self, folder: Path, call: Mapping[str, Any]):
        self._folder = folder / "samples"
        call, path = json.loads(json.dumps(call)), folder / CALL
        if path.is_file():
            old = read_json(path)
            for key in sorted(call.keys() | old.keys()):
                if call.get(key) != old.get(key):
                    raise ValueError(
                        f"{folder} holds an evaluation with {key} {old.get(key)!r}, now it is "
                        f"{call.get(key)!r}; give another --out"
                    )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(path, call)

    def _path(self, cell: Cell, seed: int, start: int) -> Path:
        return self._folder / f"{cell.name} {seed} {start:06d}.npz"

    def get(
        self,
        pipe: Pipeline,
        stored: Sequence[Mapping[str, Any]],
        cell: Cell,
        seed: int,
        progress: Callable[[int], None],
        **options: Any,
    ) -> np.ndarray:
        """Samples of a cell, one for each example of `stored`; uint8 [N, H, W, 3]."""
        parts, count = [], len(stored)
        for start in range(0, count, PART):
            stop, path = min(start + PART, count), self._path(cell, seed, start)
            if path.is_file():
                with np.load(path) as file:
                    kept = file["images"]
                if len(kept) == stop - start:
                    parts.append(kept)
                    progress(stop - start)
                    continue
            rows = [
                {
                    name: stored[other(i, count) if name in cell.swapped else i][name]
                    for name in cell.uses
                }
                for i in range(start, stop)
            ]
            parts.append(
                sample_each(
                    pipe, rows, cell.uses, seed=seed, first=start, progress=progress, **options
                )
            )
            new = path.with_suffix(".new")
            with new.open("wb") as file:
                np.savez_compressed(file, images=parts[-1])
            os.replace(new, path)
        return np.concatenate(parts)
