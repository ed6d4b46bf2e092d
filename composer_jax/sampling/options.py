"""How to sample: the settings of a call, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from composer_jax.diffusion.process import is_number, one_of
from composer_jax.diffusion.solvers import SOLVERS


@dataclass(frozen=True)
class Options:
    """How to sample.

    `steps`, `solver`, `spacing` of the grid ("uniform", "trailing", "karras"). `guidance`:
    classifier-free guidance weight, 1 for none, in effect inside `interval` (0 to 1 in process
    time). `eta`: noise of solver "ddim", 0 to 1. `rescale`: share of guidance's contrast that is
    taken back, 0 to 1. `autoguidance`: weight against the pipeline's `guide`, 1 for none. `start`:
    process time that sampling begins at, below 1 from an image diffused so far. `batch`: images at
    a time, by default as many as fill a machine; it changes an image in its last bits.
    """

    steps: int = 20
    guidance: float = 3.0
    solver: str = "dpmpp2m"
    spacing: str = "uniform"
    eta: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    autoguidance: float = 1.0
    start: float = 1.0
    batch: int | None = None

    def __post_init__(self):
        one_of("solver", self.solver, SOLVERS)
        for name in ("eta", "rescale"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value!r}; a number from 0 to 1 is wanted")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta is for the solver ddim; {self.solver} takes none")
        if not (is_number(self.start) and 0 < self.start <= 1):
            raise ValueError(f"start is {self.start!r}; a number above 0, at most 1, is wanted")
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise ValueError(f"{name} is {value!r}; a whole number from 1 is wanted")

    def but(self, **changes: Any) -> Options:
        """The same with what is not None of `changes`; raises ValueError for an unknown name."""
        for name in changes:
            one_of("option", name, tuple(f.name for f in fields(self)))
        return replace(self, **{name: v for name, v in changes.items() if v is not None})
