"""A job of the sampler: what its program is given, microbatch by microbatch.

An image depends on its seed, its index and the size of the microbatch: image i always stands in the
same place of the same microbatch, which is padded where images lack, so that it is the same bit for
bit whatever the count. Devices share a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from composer_jax import conditions
from composer_jax.conditions import Value
from composer_jax.models.composer import ComposerConfig
from composer_jax.sampling.program import Kind

POSITIONS = 1024  # pixels of latents that a microbatch has, if it may be more than one image


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
        for start in range(first - first % batch, count, batch):
            index = np.minimum(np.arange(start, start + batch), count - 1)
            own = {name: array[index] for name, array in self.own.items()}
            own["values"] = self.values(index)
            wanted = slice(max(first - start, 0), min(count - start, batch))
            yield place(own, "batch") | shared, wanted


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
