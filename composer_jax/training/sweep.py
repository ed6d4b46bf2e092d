"""A sweep: one config, lists and grids of overrides, seeds; each run a name and its overrides."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from composer_jax.conditions.base import meant
from composer_jax.training.config import called, load_config, python_file
from composer_jax.utils.values import SEED, Allowed, text


def _is_list(value: Any, *, least: int = 0) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) >= least


def _is_dict(value: Any, holds: Callable[[Any], bool]) -> bool:
    keys = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return keys and all(map(holds, value.values()))


def _are_overrides(value: Any) -> bool:
    return _is_list(value) and all(isinstance(word, str) for word in value)


KEYS: dict[str, Allowed] = {
    "config": text(),
    "overrides": Allowed('a list, as ("steps=1000",),', _are_overrides),
    "runs": Allowed(
        'a dict of lists of overrides, as {"small": ("batch=8",)},',
        lambda value: _is_dict(value, _are_overrides),
    ),
    "grid": Allowed(
        'a dict of lists of values, as {"batch": (8, 16)},',
        lambda value: _is_dict(value, lambda values: _is_list(values, least=1)),
    ),
    "seeds": Allowed(
        "a list of seeds, as (0, 1),",
        lambda value: _is_list(value, least=1) and all(map(SEED.holds, value)),
    ),
    "evaluate": Allowed('a list of words, as ("--count", 128),', _is_list),
}


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


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Sweep:
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
    module = _module(path)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{path} has no get_sweep(); a sweep file is wanted, not a config")
    given = called(module, "get_sweep", path)
    if not isinstance(given, Mapping) or not given.get("config"):
        raise ValueError(f"{path}: get_sweep() returns no dict with a config")
    for key in given:
        if key not in KEYS:
            raise ValueError(
                f"{path}: no key {key!r}{meant(key, list(KEYS))}; allowed: {', '.join(KEYS)}"
            )
        KEYS[key].check(f"{path}: {key}", given[key])
    common = (*given.get("overrides", ()), *overrides)
    points = _points(given.get("runs", {}), given.get("grid", {}))
    runs = [
        Run(label, seed, (*common, *own, f"seed={seed}"))
        for label, own in points.items()
        for seed in given.get("seeds", (0,))
    ]
    folders = [run.folder for run in runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{path}: two runs have the same name; name them apart")
    for run in runs:
        load_config(given["config"], run.overrides)
    words = tuple(map(str, given.get("evaluate", ())))
    name = Path(path).stem if path.endswith(".py") else path
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
