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

CHUNK = 16


@dataclass(frozen=True)
class Control:
    """How one condition, given alone, controls samples; means over examples, 1 is perfect.

    `wanted`: between the condition and the sample. `permuted`: samples given another example's
    condition. `floor`: samples without it. `oracle`: the image through the codec. `left_out`:
    examples that the measure does not apply to.
    """

    wanted: float
    permuted: float
    floor: float
    oracle: float
    left_out: int

    @property
    def normalised(self) -> float | None:
        """(wanted - floor) / (oracle - floor), or None where the measure tells little apart."""
        room = self.oracle - self.floor
        return (self.wanted - self.floor) / room if room >= 0.1 else None


def extract_all(
    pipe: Pipeline, images: np.ndarray, given: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Stored values of each example: a dict by condition for each of images [B, H, W, 3]."""
    batched = {name: conditions.get(name).extract(images, given, pipe.tool(name)) for name in names}
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

    Runs in padded chunks of one shape, so that there is one compilation. `options`: steps, guidance
    and solver of `Pipeline.sample`.
    """
    uses = {name: [Use(None)] for name in names}
    images = []
    for start in range(0, len(stored), CHUNK):
        chunk = [{name: [row[name]] for name in names} for row in stored[start : start + CHUNK]]
        padded = chunk + chunk[-1:] * (CHUNK - len(chunk))
        seeds = [(seed, start + i) for i in range(CHUNK)]
        images.append(pipe.sample(uses, padded, seeds=seeds, **options)[: len(chunk)])
        progress(len(chunk))
    return np.concatenate(images)


def reconstruct(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, 3] through the codec and back: what no sample can beat."""
    vae = pipe.model.vae
    decoded = vae.decode(vae.latents(vae.encode(jnp.asarray(images, jnp.float32) / 127.5 - 1.0)))
    return np.asarray(jnp.round((jnp.clip(decoded, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8))


def measure_control(
    pipe: Pipeline,
    name: str,
    stored: Sequence[Mapping[str, Any]],
    samples: np.ndarray,
    without: np.ndarray,
    through_codec: np.ndarray,
) -> Control:
    """Measures one condition on samples given it alone, samples without it, and the codec's images.

    The permuted row compares example i's condition with the sample made from example i + 1's.
    """
    condition, tool = conditions.get(name), pipe.tool(name)

    def scores(images: np.ndarray) -> np.ndarray:
        pairs = zip(stored, images, strict=True)
        return np.array([condition.measure(row[name], image, tool) for row, image in pairs])

    rows = [scores(i) for i in (samples, np.roll(samples, -1, axis=0), without, through_codec)]
    valid = np.all(np.isfinite(rows), axis=0)
    if not valid.any():
        return Control(*[float("nan")] * 4, left_out=len(stored))
    means = [float(row[valid].mean()) for row in rows]
    return Control(*means, left_out=int((~valid).sum()))
