"""The guidance plan: how uses of conditions become rows of model evaluations and their weights.

A plan is a few arrays (DESIGN 6). Rows mix the raw network outputs, in which x0 and eps are linear,
so a plan means the same at both ends of every schedule. With c the row that is given everything, u
the row that is given nothing but the negative uses, and w the guidance:

    out = w c + (1 - w) u                                       (arXiv 2207.12598, eq. 6)

Conditions i = 1..m with a `scale` g_i of their own are added one after another, in model order, to
c_0, the row without them (c_m = c; two terms are arXiv 2211.09800, eq. 3):

    out = u + w (c_0 - u) + sum_i g_i (c_i - c_{i-1})

so g_i = w changes nothing, g_i = 0 is the condition left out, and the weights sum to 1 (uses that
share a pixel share their scales). Composer's two-set guidance is the first line with c given c2 and
u given c1 (`two_sets`). Autoguidance by w' adds what a weaker network g makes of c's rows, with the
sum of all weights still 1 (arXiv 2406.02507, eq. 4): out + (w' - 1) (c - g(c)).

Several uses of one condition share the picture: in its `region` a use acts alone (where regions
overlap, each by its share), elsewhere uses without a region do, in equal shares, else none. A use
out of its window leaves its share to the others. Maps share at no cost: what stems make of them is
added up under `area` masks, within a row. Vectors and tokens cannot: each combination of their uses
that acts somewhere is a row, and c is the sum of these rows, weighted by pixel and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.process import is_number, one_of
from composer_jax.diffusion.uses import Use, as_uses, progress, span, within

BUCKETS = (1, 2, 4, 8, 16)
SIGNS = (False, True)  # is a use negative: the order of what is given and what repels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What K rows evaluate in S model evaluations, and how they mix; a pytree of traced values.

    `source` int32 [K, n]: which value of the bank each of n conditions takes: j is the j-th use of
    that condition (from 1), 0 is absent. A spatial one takes all its positive uses (1) or all its
    negative ones (2), as `area` says. `strength` float32 [S, K, n]: how strongly, in [0, 1].
    `weight` float32 [S, K, h, w], or [S, K, 1, 1]: how rows mix; `guide`, the same shape: what the
    second network's rows add. Both sum to 1 over K together. `given`, the same shape: c alone.
    `area` float32 [S, m, 2, J, h, w]: of m spatial conditions, in order, how strongly use j acts in
    each pixel, among the positive uses and among the negative ones. `probe` int32 [P]: rows to
    compare: of nothing, then of each probed condition alone.
    """

    source: jax.Array | np.ndarray
    strength: jax.Array | np.ndarray
    weight: jax.Array | np.ndarray
    guide: jax.Array | np.ndarray
    given: jax.Array | np.ndarray
    area: jax.Array | np.ndarray
    probe: jax.Array | np.ndarray


def mix(outputs: jax.Array, weight: jax.Array) -> jax.Array:
    """Mixes raw outputs [K, B, h, w, c] by weight [K, h, w] (or [K, 1, 1]) to [B, h, w, c]."""
    return jnp.sum(weight[:, None, :, :, None] * outputs, axis=0)


def rescale(mixed: jax.Array, given: jax.Array, amount: jax.Array | float) -> jax.Array:
    """Takes a share of the contrast back that guidance adds (arXiv 2305.08891, eqs. 15 and 16).

    `mixed`, `given` [B, h, w, c]: the output under guidance, and c alone. `amount` in [0, 1]: 0
    returns `mixed`, 1 gives it `given`'s standard deviation, each example its own.
    """
    deviation = partial(jnp.std, axis=(1, 2, 3), keepdims=True)
    return mixed * (1.0 + amount * (deviation(given) / jnp.maximum(deviation(mixed), 1e-8) - 1.0))


def bucket(count: int, what: str = "rows") -> int:
    """The smallest of BUCKETS that holds `count`; raises ValueError where none does."""
    for size in BUCKETS:
        if count <= size:
            return size
    raise ValueError(
        f"{count} {what} are needed, {BUCKETS[-1]} is the most: use fewer conditions "
        "with several values, regions or scales"
    )


def build_plan(
    uses: Mapping[str, Any],
    names: Sequence[str],
    times: np.ndarray,
    *,
    guidance: float = 3.0,
    interval: tuple[float, float] = (0.0, 1.0),
    autoguidance: float = 1.0,
    size: tuple[int, int] | None = None,
    spatial: Sequence[str] = (),
    probe: Sequence[str] = (),
    values: int = 1,
    start: float = 1.0,
) -> Plan:
    """Makes the plan, on the host, in numpy; see the top of this file for what it computes.

    `uses`: condition -> a Use, a list of them or a bare value. `names`: the model's conditions, in
    order (n of them). `times`: process time of each evaluation, [S], as of `evaluation_times`.
    `guidance`: w. `autoguidance`: w'. `interval`: (start, end), the share of sampling in which w,
    w' and scales above 1 act (arXiv 2404.07724); outside they are 1. `size`: (h, w) of the latents;
    regions need it, and with it weights always are [S, K, h, w], so that a region more or less
    never recompiles. `spatial`: those of `names` whose uses share a picture by `area`. `probe`:
    conditions that get a row of their own (their first positive use), of weight 0. `values`: J at
    least. `start`: the process time at which sampling begins; windows and `interval` are shares of
    the time from there to 0.

    Rows: c's (row 0 where no uses share the picture), u's (row 1), then the scales'; equal rows are
    one; K is padded to one of BUCKETS with absent rows of weight 0, J likewise. Raises ValueError
    for an unknown condition, a value out of range, or more rows than the largest bucket.
    """
    uses = {name: as_uses(value) for name, value in uses.items()}
    for name in uses:
        one_of("condition", name, tuple(names))
    for what, value in (("guidance", guidance), ("autoguidance", autoguidance)):
        if not is_number(value):
            raise ValueError(f"{what} is {value!r}; a number is wanted")
    done = progress(times, start)
    inside = within(span("interval", interval), done)

    def limited(value):
        return np.where(inside, value, min(value, 1.0))[:, None, None]

    ways = {
        name: [_alternatives(uses.get(name, ()), negative, done, size) for negative in SIGNS]
        for name in names
    }
    given, repelled = (
        [_together(ways[name][i], i + 1) if name in spatial else ways[name][i] for name in names]
        for i in range(2)
    )
    nothing = [_alternatives((), False, done, size)] * len(names)
    scaled = [i for i, name in enumerate(names) if _has_scale(uses.get(name, ()))]

    w, push = limited(float(guidance)), limited(float(autoguidance)) - 1.0
    gains = [w] + [
        sum(one.share * (w if one.scale is None else limited(one.scale)) for one in both[0])
        for both in (ways[names[i]] for i in scaled)
    ]
    always = np.zeros((len(done), 1, 1))
    rows: dict[tuple[int, ...], np.ndarray] = {}  # by source: weight, guide and given, stacked

    def add(conditions, weight, guide=0.0, alone=0.0):
        factors = np.stack(np.broadcast_arrays(weight + always, guide + always, alone + always))
        combinations = _combinations(conditions)
        for source, share in combinations:
            rows[source] = rows.get(source, 0.0) + factors * share
        return combinations[0][0]

    add(given, gains[-1] + push, -push, 1.0)
    add(repelled, 1.0 - w)
    for level in range(len(scaled)):  # c_level lacks scaled[level], scaled[level + 1], ...
        without = [
            none if i in scaled[level:] else one
            for i, (one, none) in enumerate(zip(given, nothing, strict=True))
        ]
        add(without, gains[level] - gains[level + 1])
    alone = [
        [
            one if name == probed else none
            for name, one, none in zip(names, given, nothing, strict=True)
        ]
        for probed in probe
    ]
    probed = [add(conditions, 0.0) for conditions in ([nothing, *alone] if probe else ())]
    acts = [
        [one.strength * within(one.window, done) for one in uses.get(name, ())] for name in names
    ]
    places = [i for i, name in enumerate(names) if name in spatial]
    source, mixed = _stack(rows, (len(done), len(names)), size or (1, 1))
    return Plan(
        source,
        _strength(source, acts, places, len(done)),
        *mixed,
        _area([(ways[names[i]], acts[i]) for i in places], bank(uses, values), len(done), size),
        np.array([[*rows].index(row) for row in probed], np.int32),
    )


def bank(uses: Mapping[str, Any], least: int = 1) -> int:
    """J: how many values of one condition the bank holds, one of BUCKETS."""
    most = max((len(as_uses(value)) for value in uses.values()), default=1)
    return bucket(max(most, least), "values of one condition")


def _stack(rows, shape: tuple[int, int], size: tuple[int, int]):
    """`source` [K, n] and weight, guide and given [3, S, K, h, w] of rows, K padded."""
    evaluations, conditions = shape
    count = bucket(len(rows))
    source = np.zeros((count, conditions), np.int32)
    source[: len(rows)] = np.array([*rows], np.int32).reshape(len(rows), conditions)
    mixed = np.zeros((3, evaluations, count, *size), np.float32)
    for k, factors in enumerate(rows.values()):
        mixed[:, :, k] = factors
    return source, mixed


def _strength(source, acts, spatial: Sequence[int], evaluations: int) -> np.ndarray:
    """[S, K, n]: a use's own, in its window; 1 for the spatial ones, whose `area` holds it."""
    strength = np.zeros((evaluations, *source.shape), np.float32)
    for i, ones in enumerate(acts):
        for j, act in enumerate(ones, 1):
            strength[:, source[:, i] == j, i] = act[:, None]
    strength[:, :, spatial] = source[:, spatial] > 0
    return strength


def _area(spatial, values: int, evaluations: int, size) -> np.ndarray:
    """[S, m, 2, J, h, w]: share times strength of each use of each spatial condition."""
    area = np.zeros((evaluations, len(spatial), 2, values, *(size or (1, 1))), np.float32)
    for m, (ways, acts) in enumerate(spatial):
        for sign, ones in enumerate(ways):
            for way in ones:
                if way.source:
                    area[:, m, sign, way.source - 1] = (
                        acts[way.source - 1][:, None, None] * way.share
                    )
    return area


def trimmed(plan: Plan, least: int = 1) -> Plan:
    """The plan without rows that never act, padded to the next bucket that holds `least`.

    Rows that the second network evaluates, too, come first.
    """
    acting = (plan.weight != 0.0) | (plan.guide != 0.0) | (plan.given != 0.0)
    acting = np.any(acting, axis=(0, 2, 3))
    acting[plan.probe] = True
    rows = np.flatnonzero(acting)
    guided = np.any(plan.guide != 0.0, axis=(0, 2, 3))
    rows = rows[np.argsort(~guided[rows], kind="stable")]
    count = bucket(max(len(rows), least))

    def cut(array: np.ndarray, axis: int) -> np.ndarray:
        widths = [(0, count - len(rows)) if i == axis else (0, 0) for i in range(array.ndim)]
        return np.pad(np.take(array, rows, axis), widths)

    mixed = (cut(one, 1) for one in (plan.weight, plan.guide, plan.given))
    probe = np.array([np.flatnonzero(rows == row)[0] for row in plan.probe], np.int32)
    return Plan(cut(plan.source, 0), cut(plan.strength, 1), *mixed, plan.area, probe)


class _Alternative(NamedTuple):
    """One way a condition is given: the `source` it takes, and its share [S, h, w] of the picture.

    Source 0 is absent. `scale`: the use's own.
    """

    source: int
    share: np.ndarray
    scale: float | None = None


def _alternatives(uses, negative, done, size) -> list[_Alternative]:
    """The ways a condition is given by its positive (or negative) uses; shares sum to 1."""
    chosen = {j: one for j, one in enumerate(uses, 1) if one.negative == negative}
    ones = np.ones((len(done), 1, 1))
    if not chosen:
        return [_Alternative(0, ones)]
    if len(chosen) == 1 and all(one.region is None for one in chosen.values()):
        return [_Alternative(j, ones, one.scale) for j, one in chosen.items()]
    active = {j: ones * within(one.window, done)[:, None, None] for j, one in chosen.items()}
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


def _together(ways: Sequence[_Alternative], source: int) -> list[_Alternative]:
    """All ways at once, as one: of a spatial condition, whose `area` holds their shares."""
    given = any(way.source for way in ways)
    return [_Alternative(source if given else 0, np.ones((1, 1, 1)))]


def _combinations(conditions: Sequence[Sequence[_Alternative]]):
    """Every combination of the conditions' alternatives that acts somewhere: (source, share)."""
    rows = [((), np.ones((1, 1, 1)))]
    for ways in conditions:
        rows = [
            ((*source, way.source), both)
            for source, share in rows
            for way in ways
            if (both := share * way.share).any()
        ]
        bucket(len(rows))
    return rows


def _has_scale(uses: Sequence[Use]) -> bool:
    return any(one.scale is not None for one in uses)


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
