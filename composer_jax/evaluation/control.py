"""Control, measured: conditions are taken out of samples again and compared with what was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax import conditions
from composer_jax.diffusion import Use
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.models import find_part, load_depth

CHUNK = 16


@dataclass(frozen=True)
class Control:
    """How one condition, given alone, controls samples; means over examples, 1 is perfect.

    `wanted`: between the condition and the sample. `permuted`: samples given another example's
    condition. `floor`: samples without it. `oracle`: the image through the codec. `interval`: a
    bootstrap 95 % interval of `normalised` over examples. `left_out`: examples that the measure
    does not apply to.
    """

    wanted: float
    permuted: float
    floor: float
    oracle: float
    interval: tuple[float, float]
    left_out: int

    @property
    def normalised(self) -> float | None:
        """(wanted - floor) / (oracle - floor), or None where the measure tells little apart."""
        room = self.oracle - self.floor
        return (self.wanted - self.floor) / room if room >= 0.1 else None

    def row(self) -> list[str]:
        """The cells of a table under `HEAD`."""
        numbers = [f"{n:.3f}" for n in (self.wanted, self.permuted, self.floor, self.oracle)]
        if self.normalised is None:
            return [*numbers, "-", "-", str(self.left_out)]
        low, high = self.interval
        return [*numbers, f"{self.normalised:.2f}", f"{low:.2f} to {high:.2f}", str(self.left_out)]


HEAD = ("sample", "permuted", "floor", "oracle", "normalised", "95 % interval", "left out")


def scenes_tools(pipe: Pipeline) -> dict[str, Any]:
    """The tools that measure samples of the built-in world: the model's CLIP, depth's regressor."""
    return {"clip": pipe.clip, "depth": load_depth(find_part("bundled", "depth")).tool()}


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
    names: Sequence[str],
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> np.ndarray:
    """One sample for each example, given its conditions `names`; uint8 [B, H, W, 3].

    `options`: of `Pipeline.sample`.
    """
    uses = {name: [Use(None)] for name in names}
    images = []
    for start in range(0, len(stored), CHUNK):
        chunk = [{name: [row[name]] for name in names} for row in stored[start : start + CHUNK]]
        seeds = [(seed, start + i) for i in range(len(chunk))]
        images.append(pipe.sample(uses, chunk, seeds=seeds, batch=CHUNK, **options))
        progress(len(chunk))
    return np.concatenate(images)


def reconstruct(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, 3] through the codec and back: what no sample can beat."""
    vae = pipe.model.vae
    decoded = vae.decode(vae.latents(vae.encode(jnp.asarray(images, jnp.float32) / 127.5 - 1.0)))
    return np.asarray(jnp.round((jnp.clip(decoded, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8))


def measure_control(
    name: str,
    stored: Sequence[Mapping[str, Any]],
    samples: Sequence[np.ndarray],
    without: Sequence[np.ndarray],
    through_codec: np.ndarray,
    tools: Mapping[str, Any],
) -> Control:
    """Measures one condition: samples given it alone, samples without it, and the codec's images.

    `samples`, `without`: uint8 [B, H, W, 3] for each sampling seed; scores are means over seeds.
    The permuted row compares example i's condition with the sample made from example i + 1's.
    Raises ValueError where the measure wants a tool that `tools` lacks.
    """
    condition, wanted = conditions.get(name), [row[name] for row in stored]
    judge, tool = condition.judge(wanted), tools.get(condition.tool)

    def scores(images: np.ndarray) -> np.ndarray:
        return np.array(
            [judge(one, image, tool) for one, image in zip(wanted, images, strict=True)]
        )

    def over_seeds(seeds: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean([scores(images) for images in seeds], axis=0)

    rolled = [np.roll(images, -1, axis=0) for images in samples]
    rows = np.array(
        [over_seeds(samples), over_seeds(rolled), over_seeds(without), scores(through_codec)]
    )
    valid = rows[:, np.all(np.isfinite(rows), axis=0)]
    if not valid.size:
        nan = float("nan")
        return Control(nan, nan, nan, nan, (nan, nan), left_out=len(stored))
    means = [float(mean) for mean in valid.mean(axis=1)]
    left_out = len(stored) - valid.shape[1]
    return Control(*means, interval=_bootstrap(valid), left_out=left_out)


def _bootstrap(rows: np.ndarray, rounds: int = 2000) -> tuple[float, float]:
    """The 95 % interval of normalised control over examples drawn again; rows [4, N]."""
    drawn = np.random.default_rng(0).integers(rows.shape[1], size=(rounds, rows.shape[1]))
    wanted, _, floor, oracle = rows[:, drawn].mean(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):  # no room at all: no interval
        low, high = np.percentile((wanted - floor) / (oracle - floor), [2.5, 97.5])
    return float(low), float(high)
