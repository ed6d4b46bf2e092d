"""Uses: how a value of a condition is used, and the two sets of Composer's guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from composer_jax.diffusion.process import is_number
from composer_jax.utils.painted import painted


@dataclass(frozen=True, eq=False)
class Use:
    """A value of a condition and how it is used; see `use`."""

    value: Any
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    scale: float | None = None
    region: Any = None
    negative: bool = False

    def __post_init__(self):
        if not (is_number(self.strength) and 0 <= self.strength <= 1):
            raise ValueError(f"strength is {self.strength!r}; a number from 0 to 1 is wanted")
        object.__setattr__(self, "window", span("window", self.window))
        if self.scale is not None and not (is_number(self.scale) and self.scale >= 0):
            raise ValueError(f"scale is {self.scale!r}; a number from 0 is wanted, or none")
        if not isinstance(self.negative, (bool, np.bool_)):
            raise ValueError(f"negative is {self.negative!r}; true or false is wanted")
        if self.negative and self.scale is not None:
            raise ValueError("a negative use takes no scale; guidance says how strongly it repels")
        if self.region is not None:
            object.__setattr__(self, "region", _region(self.region))


def use(
    value: Any,
    strength: float = 1.0,
    window: tuple[float, float] = (0.0, 1.0),
    scale: float | None = None,
    region: Any = None,
    negative: bool = False,
) -> Use:
    """Says how a condition's value is used.

    `strength` in [0, 1]: how much of what it adds. `window`: (start, end) in [0, 1], the share of
    sampling in which it acts: (0, 0.6) is the first 60 % of the process time that is run through,
    wherever sampling begins (of the steps, on an even grid). `scale`: guidance of this condition
    alone, from 0. `region`: [h, w] in [0, 1], or an image as `painted` reads it, white where it
    acts; of any size, and where it has another shape than the picture its middle counts, as of a
    photo. `negative`: what the picture is to move away from. Raises ValueError for a value out of
    range.
    """
    return Use(value, strength, window, scale, region, negative)


def as_uses(value: Any) -> tuple[Use, ...]:
    """A condition's uses: of a Use, of a list that holds one, or of a bare value."""
    if isinstance(value, Use):
        return (value,)
    if isinstance(value, (list, tuple)) and any(isinstance(item, Use) for item in value):
        return tuple(item if isinstance(item, Use) else Use(item) for item in value)
    return (Use(value),)


def two_sets(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Use, ...]]:
    """Composer's guidance from c1 to c2: w * eps(c2) + (1 - w) * eps(c1) (arXiv 2302.09778, 2.2).

    What is in both is weighted 1, only in `second` w, only in `first` 1 - w. Returns uses for
    `build_plan`: the second set's, then the first's as negative ones. Raises ValueError for a
    negative use in either and for a scale in `first`.
    """
    merged = {name: as_uses(value) for name, value in second.items()}
    others = {name: as_uses(value) for name, value in first.items()}
    for name, uses in (*merged.items(), *others.items()):
        if any(one.negative for one in uses):
            raise ValueError(f"{name}: with two sets a use cannot be negative")
    for name, uses in others.items():
        repelled = tuple(replace(one, negative=True) for one in uses)
        merged[name] = merged.get(name, ()) + repelled
    return merged


def span(what: str, value) -> tuple[float, float]:
    """(start, end) with 0 <= start < end <= 1; raises ValueError, naming `what`, for another."""
    numbers = tuple(value) if isinstance(value, (list, tuple, np.ndarray)) else ()
    if len(numbers) != 2 or not all(is_number(number) for number in numbers):
        raise ValueError(f"{what} is {value!r}; (start, end) is wanted")
    start, end = float(numbers[0]), float(numbers[1])
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"{what} is ({start:g}, {end:g}); 0 <= start < end <= 1 is wanted")
    return start, end


def progress(times: np.ndarray, start: float = 1.0) -> np.ndarray:
    """The share of sampling that is done at process `times`, where it begins at `start`, from 0 to
    1; what windows and intervals are compared with. float64 of the shape of `times`."""
    return np.round(1.0 - np.asarray(times, np.float64) / start, 6)


def within(span: tuple[float, float], progress: np.ndarray) -> np.ndarray:
    """Where start <= progress < end; an end of 1 includes the end itself."""
    start, end = span
    return (progress >= start) & ((progress < end) | (end == 1.0))


def check_spans(
    uses: Mapping[str, Any], interval: tuple[float, float], times: np.ndarray, start: float = 1.0
) -> None:
    """Raises ValueError for a window or an interval that meets none of the evaluations at `times`:
    what has it would do nothing."""
    done = progress(times, start)
    spans = [("interval", interval)]
    spans += [(f"{name}: window", one.window) for name, ones in uses.items() for one in ones]
    for what, span in spans:
        if not within(span, done).any():
            shares = [f"{share + 0.0:.3g}" for share in np.unique(done)]
            made = ", ".join(shares if len(shares) < 5 else [*shares[:3], "...", shares[-1]])
            raise ValueError(
                f"{what} ({span[0]:g}, {span[1]:g}) meets no evaluation; sampling makes them at "
                f"the shares {made}: widen it or take more steps"
            )


def _region(value) -> np.ndarray:
    """As float32 [h, w]; raises ValueError for another shape or range, or an empty region."""
    region = painted(value, "region")
    if not region.any():
        raise ValueError("region is empty: 0 everywhere")
    return region
