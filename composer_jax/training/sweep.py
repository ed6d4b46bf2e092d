"""A sweep: one config, lists and grids of overrides, seeds; each run a name and its overrides."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from composer_jax.conditions.base import meant
from composer_jax.training.config import called, load_config, python_file

KEYS = ("config", "overrides", "runs", "grid", "seeds", "evaluate")


@dataclass(frozen=True)
class Run:
    """One run of a sweep. `label`: what all seeds of it share; `folder`: its name on disk."""

    label: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """A name that every file system takes."""
        return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', self.label)}-seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says. `evaluate`: words for `composer evaluate`; `doc`: its docstring."""

    name: str
    config: str
    runs: tuple[Run, ...]
    evaluate: tuple[str, ...]
    doc: str


def load_sweep(text: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep that `ablations/NAME` or `FILE.py` names; `overrides` are for every run.

    Its `get_sweep()` returns a dict:

        config     of every run, as `--config` takes it
        overrides  ("steps=1000", ...) for every run
        runs       label -> overrides; or none
        grid       key -> values: all combinations, combined with `runs`; or none
        seeds      (0, 1, 2)
        evaluate   ("--count", "128", ...): words for `composer evaluate`

    Every run's config is built here, so that a wrong key is said before the first run. Raises
    ValueError, one line.
    """
    module = _module(text)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{text} has no get_sweep(); a sweep file is wanted, not a config")
    given = called(module, "get_sweep", text)
    if not isinstance(given, Mapping) or not given.get("config"):
        raise ValueError(f"{text}: get_sweep() returns no dict with a config")
    for key in given:
        if key not in KEYS:
            raise ValueError(
                f"{text}: no key {key!r}{meant(key, KEYS)}; allowed: {', '.join(KEYS)}"
            )
    common = (*given.get("overrides", ()), *overrides)
    points = _points(given.get("runs", {}), given.get("grid", {}))
    runs = [
        Run(label, seed, (*common, *own, f"seed={seed}"))
        for label, own in points.items()
        for seed in given.get("seeds", (0,))
    ]
    folders = [run.folder for run in runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{text}: two runs have the same name; name them apart")
    for run in runs:
        load_config(given["config"], run.overrides)
    words = tuple(map(str, given.get("evaluate", ())))
    name = Path(text).stem if text.endswith(".py") else text
    return Sweep(name, given["config"], tuple(runs), words, module.__doc__ or "")


def _points(runs: Mapping[str, Sequence[str]], grid: Mapping) -> dict[str, tuple[str, ...]]:
    """Label -> overrides of every combination."""
    listed = {label: tuple(own) for label, own in runs.items()} or {"": ()}
    crossed = [
        tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
        for values in itertools.product(*grid.values())
    ]
    return {
        " ".join(filter(None, [label, *point])) or "run": (*own, *point)
        for label, own in listed.items()
        for point in crossed
    }


def _module(text: str) -> ModuleType:
    if text.endswith(".py"):
        return python_file(text)
    import composer_jax.configs.ablations as package

    known = [f"ablations/{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    if text not in known:
        raise ValueError(
            f"no sweep {text!r}{meant(text, known)}; there are {', '.join(known)}, or give a .py "
            "file"
        )
    return importlib.import_module(f"composer_jax.configs.{text.replace('/', '.')}")
