"""Control, measured: conditions are taken out of samples again and compared with what was asked.

A metric that a blank image can win says nothing, so every score here is an excess over chance:
what the same images score for *other* examples' conditions or, for maps, when they are rolled by
half a side, whichever is most. Whatever does not depend on the condition, a blank, the mean image,
noise, has an excess of 0, and so has a map in the wrong place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax import conditions
from composer_jax.diffusion import Use
from composer_jax.models.vae import VAE
from composer_jax.sampling.pipeline import Pipeline

CHUNK = 16
REMEMBERED = 2**28  # bytes of what tools saw in images
OTHERS = (2, 5, 11)  # whose conditions chance is measured by: examples so far on
ROLLS = ((1, 0), (0, 1), (1, 1))  # half sides, down and right
LEAST_ROOM = 0.1  # between floor and oracle, in score and excess; with less nothing is told apart
TOO_NEAR = f"floor and oracle are less than {LEAST_ROOM} apart, in score or in excess over chance"
KNOWN = ("sample", "permuted", "floor", "oracle")
HEAD = (
    "control", "95 % interval", "sample", "permuted", "floor", "oracle", "image",
    "blank", "mean image", "noise", "shifted", "left out",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kind of images: `score`, the mean measure; `excess` over chance; `normalised`, if any."""

    score: float
    excess: float
    normalised: float | None


@dataclass(frozen=True)
class Control:
    """How one condition, given alone, controls samples; means over examples, 1 is perfect.

    `rows`: "sample" given the condition; "permuted" given another example's; "floor" without it;
    "oracle", the image through the codec; and others that were handed in. `interval`: a bootstrap
    95 % interval of the sample's normalised excess. `beside`: further measures, by name and row.
    `left_out`: examples that the measure does not apply to. `scores`: of each example's sample
    under the first seed, nan where left out.
    """

    rows: Mapping[str, Row]
    interval: tuple[float, float] | None
    left_out: int
    scores: np.ndarray
    beside: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def normalised(self) -> float | None:
        """(excess - floor) / (oracle's - floor), the floor being at least chance, 0; None with too
        little room between."""
        return self.rows["sample"].normalised

    def cells(self) -> list[str]:
        """The cells of a table under `HEAD`."""
        first = ["-", "-"]
        if self.normalised is not None:
            first = [f"{self.normalised:.3f}", "{:.2f} to {:.2f}".format(*self.interval)]
        scores = [
            f"{self.rows[kind].score:.3f}" if kind in self.rows else "" for kind in HEAD[2:-1]
        ]
        return [*first, *scores, str(self.left_out)]


def extract_all(
    images: np.ndarray,
    given: Mapping[str, Any],
    names: Sequence[str],
    tools: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Stored values of each example: a dict by condition for each of images [B, H, W, 3]."""
    batched = {
        name: conditions.get(name).extract(images, given, tools.get(conditions.get(name).tool))
        for name in names
    }
    return [
        {
            name: jax.tree.map(lambda a, i=i: a[i], stored, is_leaf=lambda a: isinstance(a, list))
            for name, stored in batched.items()
        }
        for i in range(len(images))
    ]


def sample_each(
    pipe: Pipeline,
    stored: Sequence[Mapping[str, Any]],
    uses: Mapping[str, Use],
    *,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> np.ndarray:
    """One sample for each example, given its conditions as `uses` says; uint8 [B, H, W, 3].

    `first`: the number of the first example, for its noise. `batch`: images at a time, 16 by
    default. `options`: of `Pipeline.sample`.
    """
    wanted, batch = {name: [use] for name, use in uses.items()}, batch or CHUNK
    images = []
    for start in range(0, len(stored), batch):
        chunk = [{name: [row[name]] for name in uses} for row in stored[start : start + batch]]
        seeds = [(seed, first + start + i) for i in range(len(chunk))]
        images.append(pipe.sample(wanted, chunk, seeds=seeds, batch=batch, **options))
        progress(len(chunk))
    return np.concatenate(images)


def reconstruct(vae: VAE, images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, 3] through a codec and back: what no sample can beat."""
    back = []
    for start in range(0, len(images), CHUNK):
        chunk = jnp.asarray(images[start : start + CHUNK], jnp.float32) / 127.5 - 1.0
        decoded = jnp.clip(vae.decode(vae.latents(vae.encode(chunk))), -1.0, 1.0)
        back.append(np.asarray(jnp.round((decoded + 1.0) * 127.5).astype(jnp.uint8)))
    return np.concatenate(back)


def degenerate(images: np.ndarray) -> dict[str, np.ndarray]:
    """Images that know nothing of any condition, as many and as large as uint8 [B, H, W, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    mean = np.round(images.mean(axis=0, keepdims=True)).astype(np.uint8)
    return {
        "blank": np.full_like(images, 128),
        "mean image": np.repeat(mean, len(images), axis=0),
        "noise": noise,
        "shifted": np.roll(images, images.shape[2] // 2, axis=2),
    }


def tool_of(name: str, tools: Mapping[str, Any]) -> Any:
    """The tool by which a condition is measured, or None."""
    condition = conditions.get(name)
    preferred = tools.get(condition.judged_by) if condition.judged_by else None
    return tools.get(condition.tool) if preferred is None else preferred


def remembering(tools: Mapping[str, Any]) -> dict[str, Any]:
    """The tools, those that look at images remembering what they saw, one memory for each."""

    def one(tool: Any) -> Any:
        looks = callable(tool) or hasattr(tool, "image")
        return Remembering(tool) if looks and not isinstance(tool, Remembering) else tool

    return {name: one(tool) for name, tool in tools.items()}


def measure_each(
    name: str, wanted: Sequence[Any], images: np.ndarray, tools: Mapping[str, Any]
) -> np.ndarray:
    """The condition's own measure of each of images uint8 [B, H, W, 3]; nan: does not apply.

    Raises ValueError where the measure wants a tool that `tools` lacks.
    """
    judge = conditions.get(name).judge(wanted)
    return _scores(judge, [wanted], images, tool_of(name, remembering(tools)))[0]


def measure_control(
    name: str,
    stored: Sequence[Mapping[str, Any]],
    images: Mapping[str, Sequence[np.ndarray]],
    tools: Mapping[str, Any],
) -> Control:
    """Measures one condition.

    `images`: by row, for each sampling seed uint8 [B, H, W, 3]: "sample", given the condition
    alone, "floor", without it, "oracle", through the codec, and whatever else is to be measured
    ("shifted" only where the condition is a map). Scores are means over seeds; chance is measured
    on the first. The permuted row compares example i's condition with the sample made from example
    i + 1's. Raises ValueError where the measure wants a tool that `tools` lacks.
    """
    condition, wanted = conditions.get(name), [row[name] for row in stored]
    spatial = condition.spatial
    rows = {kind: list(seeds) for kind, seeds in images.items() if spatial or kind != "shifted"}
    rows["permuted"] = [np.roll(seed, -1, axis=0) for seed in rows["sample"]]
    tool = tool_of(name, remembering(tools))
    judge = partial(_scores, condition.judge(wanted), tool=tool)
    own, raw, chance = {}, {}, {}
    for kind, (one, *more) in rows.items():
        own[kind], chance[kind] = _own_and_chances(judge, wanted, one, spatial)
        raw[kind] = np.mean([own[kind], *(judge([wanted], seed)[0] for seed in more)], axis=0)
    valid = np.all(np.isfinite(list(raw.values())), axis=0)
    left_out, first = int(np.count_nonzero(~valid)), own["sample"]
    if not valid.any():
        nothing = Row(float("nan"), float("nan"), None)
        return Control(dict.fromkeys(rows, nothing), None, left_out, first)

    def excess(kind: str, index=valid) -> np.ndarray:
        """Over the largest chance; `index` picks examples, [N] or, for the bootstrap, [R, N]."""
        above = [np.nanmean(one[index], axis=-1) for one in chance[kind]]
        return np.nanmean(raw[kind][index], axis=-1) - np.max(above, axis=0)

    score = {kind: float(values[valid].mean()) for kind, values in raw.items()}
    floor, oracle = np.maximum(excess("floor"), 0.0), excess("oracle")
    enough = min(score["oracle"] - score["floor"], oracle - floor) >= LEAST_ROOM

    def row(kind: str) -> Row:
        over = float(excess(kind))
        return Row(score[kind], over, float((over - floor) / (oracle - floor)) if enough else None)

    found = {kind: row(kind) for kind in rows}
    interval = _interval(excess, np.flatnonzero(valid)) if enough else None
    return Control(found, interval, left_out, first, _beside(name, stored, rows, tool))


def _scores(
    function: Callable, asked: Sequence[Sequence[Any]], images: np.ndarray, tool: Any
) -> np.ndarray:
    """What each of images scores by each of the lists in `asked`: [lists, N]."""
    if isinstance(tool, Remembering):
        tool.look(images)
    return np.array(
        [[function(*pair, tool) for pair in zip(each, images, strict=True)] for each in asked]
    )


class Remembering:
    """A tool that looks at many images at a time, and tells of each alone what it saw."""

    def __init__(self, tool: Any):
        """`tool`: a function of images uint8 [B, H, W, 3], or a CLIP."""
        self._function = tool if callable(tool) else tool.image
        self._found: dict[str, np.ndarray] = {}
        self.sizes = getattr(tool, "sizes", None)

    def look(self, images: np.ndarray) -> None:
        """Looks at what it has not seen, CHUNK at a time; forgets all before if that is much."""
        seen = {_name(image): image for image in images}
        new = [key for key in seen if key not in self._found]
        if new and sum(one.nbytes for one in self._found.values()) > REMEMBERED:
            self._found, new = {}, list(seen)
        size = min(CHUNK, len(images))
        for start in range(0, len(new), size):
            keys = new[start : start + size]
            padded = [*keys, *keys[-1:] * (size - len(keys))]  # one size, one program
            told = self._function(np.stack([seen[key] for key in padded]))
            if len(told) != size:
                raise ValueError(f"a tool gave {len(told)} results for {size} images")
            self._found.update(zip(keys, told, strict=False))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        self.look(images)
        return np.stack([self._found[_name(image)] for image in images])

    image = __call__


def _name(image: np.ndarray) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16)
    return f"{image.shape} {digest.hexdigest()}"


def _own_and_chances(
    judge: Callable, wanted: Sequence[Any], images: np.ndarray, spatial: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N]; and [ways, N], scores by others' conditions and, of maps, by the images rolled
    in each way."""
    offsets = [k for k in OTHERS if k % len(wanted)] or [1]
    others = [[*wanted[k % len(wanted) :], *wanted[: k % len(wanted)]] for k in offsets]
    own, *by_others = judge([wanted, *others], images)
    found = [np.mean(by_others, axis=0)]
    if spatial:
        halves = [side // 2 for side in images.shape[1:3]]
        rolled = [np.roll(images, np.multiply(roll, halves), axis=(1, 2)) for roll in ROLLS]
        found += [judge([wanted], one)[0] for one in rolled]
    return own, np.array(found)


def _interval(excess: Callable, valid: np.ndarray) -> tuple[float, float]:
    """A bootstrap 95 % interval of the sample's normalised excess; `valid` indexes examples."""
    drawn = valid[np.random.default_rng(0).integers(len(valid), size=(2000, len(valid)))]
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may leave no room
        floor = np.maximum(excess("floor", drawn), 0.0)
        shares = (excess("sample", drawn) - floor) / (excess("oracle", drawn) - floor)
    low, high = np.nanpercentile(shares, [2.5, 97.5])
    return float(low), float(high)


def _beside(
    name: str,
    stored: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Sequence[np.ndarray]],
    tool: Any,
) -> dict[str, dict[str, float]]:
    """The condition's further measures, as far as its tool can tell them."""
    found = {}
    for title, function in conditions.get(name).beside(stored).items():
        score = partial(_scores, function, [stored], tool=tool)
        if np.isfinite(score(rows["oracle"][0])).any():
            found[title] = {
                kind: float(np.nanmean([score(seed) for seed in seeds]))
                for kind, seeds in rows.items()
                if kind in (*KNOWN, "image")
            }
    return found
