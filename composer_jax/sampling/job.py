"""A job of the sampler: what its program is given, microbatch by microbatch.

An image depends on its seed, its index and the size of the microbatch: image i always stands in the
same place of the same microbatch, which is padded where images lack, so that it is the same bit for
bit whatever the count. Devices share a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from composer_jax import conditions
from composer_jax.conditions import Value
from composer_jax.conditions.image import fit_map
from composer_jax.diffusion import (
    Use,
    bank,
    build_plan,
    check_spans,
    inversion,
    solvers,
    trimmed,
)
from composer_jax.diffusion.guidance import bucket
from composer_jax.diffusion.process import Process
from composer_jax.models.composer import ComposerConfig
from composer_jax.sampling.options import GRID, Options
from composer_jax.sampling.program import Kind
from composer_jax.utils.painted import painted
from composer_jax.utils.seeds import seed_words

POSITIONS = 1024  # pixels of latents that a microbatch has, if it may be more than one image


@dataclass(frozen=True)
class Frame:
    """What all jobs of a model have in common.

    `size`: of images; `side`: of their latents; `guided`: there is a second network.
    """

    config: ComposerConfig
    process: Process
    size: int
    side: int
    guided: bool = False


@dataclass(frozen=True)
class Job:
    """`shared`: inputs that all images have; `own`: arrays [count, ...]; `values(index)`: the bank.

    `batch`: images at a time, rounded up to the number of devices. `output`: which result is asked
    for. `preview`: called on the way.
    """

    kind: Kind
    shared: dict[str, Any]
    own: dict[str, np.ndarray]
    values: Callable[[np.ndarray], dict]
    batch: int
    output: str
    preview: Callable[[int, np.ndarray], None] | None = None

    def inputs(self, first: int = 0) -> Iterator[tuple[dict[str, Any], slice]]:
        """Inputs of the program for images from `first` on, and which of their rows are wanted."""
        batch = -(-self.batch // jax.local_device_count()) * jax.local_device_count()
        count, shared = len(self.own["seeds"]), place(self.shared)
        for start in range(first - first % batch, count if first < count else 0, batch):
            index = np.minimum(np.arange(start, start + batch), count - 1)
            own = {name: array[index] for name, array in self.own.items()}
            own["values"] = self.values(index)
            wanted = slice(max(first - start, 0), min(count - start, batch))
            yield place(own, "batch") | shared, wanted


def make_job(
    frame: Frame,
    options: Options,
    uses: Mapping[str, Sequence[Use]],
    stored: Sequence[Mapping[str, Sequence[Any]]],
    seeds: Sequence[tuple[int, int]],
    *,
    noise: np.ndarray | None = None,
    known: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    output: str = "images",
    preview: Callable[[int, np.ndarray], None] | None = None,
    every: int = 5,
    way: str = "",
    iterations: int = 0,
    probe: Sequence[str] = (),
    rows: int = 1,
    values: int = 1,
) -> Job:
    """Everything that the program is given to make one image for each entry of `stored`.

    `noise` float32 [B, h, w, c], `known` latents [1 or B, h, w, c], `keep` [H, W] and
    `preview` as `Pipeline` takes them; `way` and `iterations` of an inversion; `probe`: the
    conditions whose directions are compared; `rows`, `values`: K and J that there must be room for.
    Raises ValueError, one line, for what does not fit.
    """
    if (options.start < 1.0 or keep is not None or way) and known is None:
        raise ValueError("start below 1, keep and inversion need an image")
    grid = {name: getattr(options, name) for name in (*GRID, "solver")}
    times = frame.process.times(options.steps, start=options.start, **grid)
    if times[0] <= 0.0:
        raise ValueError(f"start is {options.start:g}, which {options.spacing} spacing rounds to 0")
    at = solvers.evaluation_times(times, options.solver)
    if way:
        at = inversion.inversion_times(times, options.solver, way)
    else:
        check_spans(uses, options.interval, at, times[0])
    plan = build_plan(
        uses,
        frame.config.conditions,
        at,
        guidance=options.guidance,
        interval=options.interval,
        autoguidance=options.autoguidance,
        size=(frame.side, frame.side),  # always, so that a region more or less never recompiles
        spatial=frame.config.having("spatial"),
        probe=probe,
        values=values,
        start=times[0],
    )
    plan = trimmed(plan, rows)
    guided = np.any(plan.guide != 0.0, axis=(0, 2, 3)).sum()
    kind = Kind(
        options.solver,
        noisy=bool(options.eta),
        guide=bucket(max(guided, 1)) if frame.guided else 0,  # autoguidance off compiles nothing
        inversion=way,
        iterations=iterations,
        probe=bool(probe),
        preview=preview is not None,
    )
    shared = {
        "plan": {f.name: getattr(plan, f.name) for f in fields(plan) if f.name != "probe"},
        "times": times,
        "own_noise": np.bool_(noise is not None),
        "from_known": np.bool_(options.start < 1.0),
        "eta": np.float32(options.eta),
        "rescale": np.float32(options.rescale),
        "every": np.int32(every),
        "probe": plan.probe,
    }
    own = {
        "seeds": np.array([(*seed_words(seed), index) for seed, index in seeds], np.uint32),
        **_latents(frame, len(stored), noise, known, keep),
    }
    made = bank_of(frame.config, frame.size, stored, bank(uses, values))
    return Job(kind, shared, own, made, options.batch or default_batch(frame.side), output, preview)


def _latents(frame: Frame, count: int, noise, known, keep) -> dict[str, np.ndarray]:
    """`noise`, `known` and `keep` for each image, as views of what is given, or of zeros."""
    shape = (count, frame.side, frame.side, frame.config.latent_channels)
    if noise is not None:
        if np.shape(noise) != shape:
            raise ValueError(f"noise has shape {list(np.shape(noise))}; {list(shape)} is wanted")
        if not np.isfinite(noise).all():
            raise ValueError("noise has values that are not finite")
    if known is not None and len(known) not in (1, count):
        raise ValueError(f"{len(known)} images are given for {count} samples")
    if keep is not None:
        keep, wanted = painted(keep, "keep"), (frame.size, frame.size)
        if keep.shape != wanted:
            raise ValueError(f"keep has shape {list(keep.shape)}; {list(wanted)} is wanted")
        keep = fit_map(keep, (frame.side, frame.side), "area")[..., None]

    def each(array, shape):
        return np.broadcast_to(np.asarray(0.0 if array is None else array, np.float32), shape)

    return {
        "noise": each(noise, shape),
        "known": each(known, shape),
        "keep": each(keep, (*shape[:3], 1)),
    }


def default_batch(side: int) -> int:
    """Images at a time: 4 where latents are small, else one."""
    return min(max(POSITIONS // side**2, 1), 4)


def place(tree: Any, *axes: str) -> Any:
    """On all devices of this process: copied, or split along the first axis ("batch")."""
    if jax.local_device_count() == 1:
        return jax.device_put(tree)
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def bank_of(
    config: ComposerConfig,
    size: int,
    stored: Sequence[Mapping[str, Sequence[Any]]],
    slots: int,
) -> Callable[[np.ndarray], dict]:
    """A function from images' indices [B] to the bank: condition -> part -> float32 [B, J, ...].

    `stored[b][name]`: the values of a condition for image b, `slots` (J) at most; blanks fill what
    is left. Images that share a value share its making.
    """
    made: dict[int, Mapping[str, np.ndarray]] = {}

    def value(name: str, one: Any) -> Mapping[str, np.ndarray]:
        if id(one) not in made:
            ready = one if isinstance(one, Value) else conditions.get(name).value(one)
            made[id(one)] = jax.tree.map(np.asarray, dict(ready))
        return made[id(one)]

    def values(index: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        bank = {}
        for name in config.conditions:
            shapes = {
                part: (size, size, *p.shape) if p.kind == "spatial" else p.shape
                for part, p in config.parts(name).items()
            }
            bank[name] = {
                part: np.zeros((len(index), slots, *shape), np.float32)
                for part, shape in shapes.items()
            }
            for b, number in enumerate(index):
                for j, one in enumerate(stored[number].get(name, ())):
                    for part, array in value(name, one).items():
                        bank[name][part][b, j] = array
        return bank

    return values
