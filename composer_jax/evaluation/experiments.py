"""What is sampled to measure control: cells, each a way to give conditions, kept on disk."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from composer_jax.diffusion import Use
from composer_jax.evaluation.control import sample_each
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.utils.atomic import write_bytes
from composer_jax.utils.claims import Claim

log = logging.getLogger("composer_jax")
CALL = "evaluation.json"
MORE = ("control.json", "report.html", "samples")  # what the command writes, too
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

    `call`: everything that decides what the images are but their numbers, as JSON's types; written
    with the first part; `former`: what keys mean that it may be older than. Raises as
    `utils.claims.Claim` does.
    """

    def __init__(
        self,
        folder: Path,
        call: Mapping[str, Any],
        former: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._folder = folder / "samples"
        there = sorted(self._folder.glob("*.npz"))
        self._claim = Claim(
            folder, CALL, call, results=there, tag_of=_tag, more=MORE, former=former
        )

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
            kept = _read(path)
            if kept is not None and len(kept) == stop - start:
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
            self._claim.write()
            file = io.BytesIO()
            np.savez_compressed(file, images=parts[-1], call=np.array(self._claim.tag))
            write_bytes(path, file.getbuffer(), sync=False)
        return np.concatenate(parts)


def _read(path: Path) -> np.ndarray | None:
    """The images of a part; None where it is not there, or damaged, which is logged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            images = file["images"]
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"{images.dtype} {list(images.shape)} are no images")
    except Exception as error:  # whatever a broken file makes of itself in there
        fault = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s is damaged (%s); it is made again", path, fault)
        return None
    return images


def _tag(path: Path) -> str | None:
    """The call that a part says it is of."""
    try:
        with np.load(path) as file:
            return str(file["call"])
    except Exception:  # whatever a broken file makes of itself in there
        return None
