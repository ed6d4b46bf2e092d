"""The guidance plan: how uses of conditions become rows of model evaluations and their weights.

A plan is three arrays (DESIGN 6). Rows mix the raw network outputs, in which x0 and eps are linear,
so a plan means the same at both ends of every schedule. With c the row that is given everything, u
the row that is given nothing but the negative uses, and w the guidance:

    out = w c + (1 - w) u                                       (arXiv 2207.12598, eq. 6)

Conditions i = 1..m with a `scale` g_i of their own are added one after another, in model order, to
c_0, the row without them (c_m = c; two terms are arXiv 2211.09800, eq. 3):

    out = u + w (c_0 - u) + sum_i g_i (c_i - c_{i-1})

so g_i = w changes nothing, g_i = 0 is the condition left out, and the weights sum to 1 (uses that
share a pixel share their scales). Composer's two-set guidance is the first line with c given c2 and
u given c1 (`two_sets`).

Several uses of one condition share the picture: in its `region` a use acts alone (where regions
overlap, each by its share), elsewhere uses without a region do, in equal shares, else none. A use
out of its window leaves its share to the others. Each combination of uses that acts somewhere is
a row, and c is their sum, weighted by pixel and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.process import is_number, one_of

BUCKETS = (1, 2, 4, 8, 16)


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
        object.__setattr__(self, "window", _span("window", self.window))
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
    sampling in which it acts: (0, 0.6) is the first 60 % of process time. `scale`: guidance of this
    condition alone, from 0. `region`: [h, w] in [0, 1] (any size), where it acts. `negative`: what
    the picture is to move away from. Raises ValueError for a value out of range.
    """
    return Use(value, strength, window, scale, region, negative)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What K rows evaluate in S model evaluations, and how they mix; a pytree of traced values.

    `source` int32 [K, n]: which value of the bank each of n conditions takes: j is the j-th use of
    that condition (from 1), 0 is absent. `strength` float32 [S, K, n]: how strongly, in [0, 1].
    `weight` float32 [S, K, h, w], or [S, K, 1, 1]: how rows mix, summing to 1 over K.
    """

    source: jax.Array | np.ndarray
    strength: jax.Array | np.ndarray
    weight: jax.Array | np.ndarray


def mix(outputs: jax.Array, weight: jax.Array) -> jax.Array:
    """Mixes raw outputs [K, B, h, w, c] by weight [K, h, w] (or [K, 1, 1]) to [B, h, w, c]."""
    return jnp.sum(weight[:, None, :, :, None] * outputs, axis=0)


def bucket(count: int, what: str = "rows") -> int:
    """The smallest of BUCKETS that holds `count`; raises ValueError where none does."""
    for size in BUCKETS:
        if count <= size:
            return size
    raise ValueError(
        f"{count} {what} are needed, {BUCKETS[-1]} is the most: use fewer conditions "
        "with several values, regions or scales"
    )


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


def build_plan(
    uses: Mapping[str, Any],
    names: Sequence[str],
    times: np.ndarray,
    *,
    guidance: float = 3.0,
    interval: tuple[float, float] = (0.0, 1.0),
    size: tuple[int, int] | None = None,
) -> Plan:
    """Makes the plan, on the host, in numpy; see the top of this file for what it computes.

    `uses`: condition -> a Use, a list of them or a bare value. `names`: the model's conditions, in
    order (n of them). `times`: process time of each evaluation, [S], as of `evaluation_times`.
    `guidance`: w. `interval`: (start, end), the share of sampling in which w and scales above 1 act
    (arXiv 2404.07724); outside they are 1. `size`: (h, w) of the latents; regions need it, and with
    it weights always are [S, K, h, w], so that a region more or less never recompiles.

    Rows: c's (row 0 where no uses share the picture), u's (row 1), then the scales'; equal rows are
    one; K is padded to one of BUCKETS with absent rows of weight 0. Raises ValueError for an
    unknown condition, a value out of range, or more rows than the largest bucket.
    """
    uses = {name: as_uses(value) for name, value in uses.items()}
    for name in uses:
        one_of("condition", name, tuple(names))
    if not is_number(guidance):
        raise ValueError(f"guidance is {guidance!r}; a number is wanted")
    progress = np.round(1.0 - np.asarray(times, np.float64), 6)
    inside = _active(_span("interval", interval), progress)

    def limited(value):
        return np.where(inside, value, min(value, 1.0))[:, None, None]

    given = [_alternatives(uses.get(name, ()), False, progress, size) for name in names]
    nothing = _alternatives((), False, progress, size)
    repelled = [_alternatives(uses.get(name, ()), True, progress, size) for name in names]
    scaled = [i for i, name in enumerate(names) if _has_scale(uses.get(name, ()))]

    w = limited(float(guidance))
    gains = [w] + [
        sum(one.share * (w if one.scale is None else limited(one.scale)) for one in given[i])
        for i in scaled
    ]
    weights: dict[tuple[int, ...], np.ndarray] = {}  # by source: what a row evaluates

    def add(conditions, weight):
        for source, part in _combinations(conditions, weight):
            weights[source] = weights.get(source, 0.0) + part

    add(given, gains[-1])
    add(repelled, 1.0 - w)
    for level in range(len(scaled)):  # c_level lacks scaled[level], scaled[level + 1], ...
        add(
            [nothing if i in scaled[level:] else given[i] for i in range(len(names))],
            gains[level] - gains[level + 1],
        )

    count = bucket(len(weights))
    source = np.zeros((count, len(names)), np.int32)
    source[: len(weights)] = np.array([*weights], np.int32).reshape(len(weights), len(names))
    weight = np.zeros((len(progress), count, *(size or (1, 1))), np.float32)
    for k, part in enumerate(weights.values()):
        weight[:, k] = part
    strength = np.zeros((len(progress), count, len(names)), np.float32)
    for i, name in enumerate(names):
        for j, one in enumerate(uses.get(name, ()), 1):
            acts = one.strength * _active(one.window, progress)
            strength[:, source[:, i] == j, i] = acts[:, None]
    return Plan(source, strength, weight)


class _Alternative(NamedTuple):
    """One way a condition is given: the `source` it takes, and its share [S, h, w] of the picture.

    Source 0 is absent. `scale`: the use's own.
    """

    source: int
    share: np.ndarray
    scale: float | None = None


def _alternatives(uses, negative, progress, size) -> list[_Alternative]:
    """The ways a condition is given by its positive (or negative) uses; shares sum to 1."""
    chosen = {j: one for j, one in enumerate(uses, 1) if one.negative == negative}
    ones = np.ones((len(progress), 1, 1))
    if not chosen:
        return [_Alternative(0, ones)]
    if len(chosen) == 1 and all(one.region is None for one in chosen.values()):
        return [_Alternative(j, ones, one.scale) for j, one in chosen.items()]
    active = {j: ones * _active(one.window, progress)[:, None, None] for j, one in chosen.items()}
    plain = [j for j, one in chosen.items() if one.region is None]
    share = {
        j: active[j] * _resized(one.region, size)[None]
        for j, one in chosen.items()
        if j not in plain
    }
    total = sum(share.values(), 0.0 * ones)
    share = {j: part / np.maximum(total, 1.0) for j, part in share.items()}
    rest = np.maximum(1.0 - total, 0.0)
    count = sum((active[j] for j in plain), 0.0 * ones)
    share |= {j: rest * active[j] / np.maximum(count, 1.0) for j in plain}
    ways = [_Alternative(j, share[j], one.scale) for j, one in chosen.items()]
    ways.append(_Alternative(0, rest * (count == 0.0)))
    return [way for way in ways if way.share.any()]


def _combinations(conditions: Sequence[Sequence[_Alternative]], weight: np.ndarray):
    """Every combination of the conditions' alternatives that acts somewhere: (source, weight)."""
    rows = [((), np.ones((1, 1, 1)))]
    for ways in conditions:
        rows = [
            ((*source, way.source), both)
            for source, share in rows
            for way in ways
            if (both := share * way.share).any()
        ]
        bucket(len(rows))
    return [(source, weight * share) for source, share in rows]


def _has_scale(uses: Sequence[Use]) -> bool:
    return any(one.scale is not None for one in uses)


def _active(span: tuple[float, float], progress: np.ndarray) -> np.ndarray:
    """Where start <= progress < end; an end of 1 includes the end itself."""
    start, end = span
    return (progress >= start) & ((progress < end) | (end == 1.0))


def _span(what: str, value) -> tuple[float, float]:
    numbers = tuple(value) if isinstance(value, (list, tuple, np.ndarray)) else ()
    if len(numbers) != 2 or not all(is_number(number) for number in numbers):
        raise ValueError(f"{what} is {value!r}; (start, end) is wanted")
    start, end = float(numbers[0]), float(numbers[1])
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"{what} is ({start:g}, {end:g}); 0 <= start < end <= 1 is wanted")
    return start, end


def _region(value) -> np.ndarray:
    """As float32 [h, w]; raises ValueError for another shape or range, or an empty region."""
    try:
        region = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"region is a {type(value).__name__}; an array is wanted") from None
    if region.ndim != 2 or not region.size:
        raise ValueError(f"region has shape {region.shape}; [h, w] is wanted")
    low, high = float(region.min()), float(region.max())
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"region has values from {low:g} to {high:g}; 0 to 1 is wanted")
    if high == 0.0:
        raise ValueError("region is empty: 0 everywhere")
    return region


def _resized(region: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """A region at the latents' size, by area."""
    if size is None:
        raise ValueError("a region needs the latents' size: build_plan(..., size=(h, w))")
    rows, columns = (_overlaps(old, new) for old, new in zip(region.shape, size, strict=True))
    return np.clip(rows @ region.astype(np.float64) @ columns.T, 0.0, 1.0)


def _overlaps(old: int, new: int) -> np.ndarray:
    """[new, old]: the share that each old cell has of each new one."""
    edges_old, edges_new = np.arange(old + 1) / old, np.arange(new + 1) / new
    low = np.maximum(edges_new[:-1, None], edges_old[None, :-1])
    high = np.minimum(edges_new[1:, None], edges_old[None, 1:])
    return np.maximum(high - low, 0.0) * new
