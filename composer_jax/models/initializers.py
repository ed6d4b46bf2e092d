"""What networks start from, drawn on the host: nothing is traced or compiled for it.

A network built with `rngs=LATER` holds, in place of arrays, how each is drawn (`Start`). A number
then depends on the seed, the parameter's path and its place in the array alone, so that parameters
are the same on every mesh, and each process draws the part that it holds.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax.models.files import Tensor, dotted, on_device

Index = tuple[slice, ...]
LEVELS = 2**16  # different numbers that a truncated normal is drawn from
PER_BLOCK = 16  # of them from a block of Philox's counter


class Later:
    """In place of `nnx.Rngs`: initialisers say how an array is drawn instead of drawing it."""

    def params(self) -> Later:
        """What initialisers take for a key."""
        return self


LATER: Any = Later()


@dataclass(frozen=True)
class Start:
    """An array not drawn yet: all `constant`, or, where `scale` is above 0, normal numbers times
    `scale`, truncated at 2."""

    shape: tuple[int, ...]
    dtype: np.dtype
    constant: float = 0.0
    scale: float = 0.0

    def drawn(self, seed: int, path: str) -> Tensor:
        """The array of that seed and parameter's path, drawn when it is read."""
        whole = tuple(slice(0, size) for size in self.shape)

        def part(index: Index) -> np.ndarray:
            return self._part(seed, path, index)

        return Tensor(self.shape, self.dtype, lambda: part(whole), part)

    def _part(self, seed: int, path: str, index: Index) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        shape = tuple(stop - start for start, stop in bounds)
        if not self.scale:
            return np.full(shape, self.constant, self.dtype)
        key = hashlib.blake2b(f"{seed} {path}".encode(), digest_size=16).digest()
        # the last axis that is cut: what lies before it is taken apart into runs
        cut = max((i for i, n in enumerate(self.shape) if shape[i] < n), default=0)
        inner, run = math.prod(self.shape[cut + 1 :]), math.prod(shape[cut:])
        found = np.empty((math.prod(shape[:cut]), run), np.float32)
        for row, place in zip(found, np.ndindex(*shape[:cut]), strict=True):
            first = 0
            for at, (start, _), size in zip((*place, 0), bounds, self.shape, strict=False):
                first = first * size + start + at
            _normal(int.from_bytes(key, "little"), first * inner, row)
        found *= np.float32(self.scale)
        return found.reshape(shape).astype(self.dtype, copy=False)


def _normal(key: int, first: int, out: np.ndarray) -> None:
    """Writes normal numbers `first`, `first` + 1, ... of an endless row, truncated at 2."""
    block, skipped = divmod(first, PER_BLOCK)
    blocks = -(-(skipped + out.size) // PER_BLOCK)
    raw = np.random.Philox(key=key, counter=block).random_raw(4 * blocks)
    levels = raw.astype("<u8", copy=False).view("<u2")[skipped : skipped + out.size]
    np.take(_quantiles(), levels, out=out)


@functools.cache
def _quantiles() -> np.ndarray:
    """The middles of LEVELS equally likely parts of a normal truncated at 2, float32."""
    from scipy.special import ndtr, ndtri

    low = ndtr(-2.0)
    return ndtri(low + (1 - 2 * low) * (np.arange(LEVELS) + 0.5) / LEVELS).astype(np.float32)


def _later(initializer: Callable, constant: float, scale: Callable[[Sequence[int]], float]):
    """`initializer`, which says how the array is drawn where its key is LATER."""

    def start(key, shape: Sequence[int], dtype=jnp.float32, **options):
        if key is LATER:
            return Start(tuple(shape), np.dtype(dtype), constant, scale(shape))
        return initializer(key, shape, dtype, **options)

    return start


TRUNCATED = 0.87962566103423978  # the deviation of a unit normal truncated at 2
none = lambda shape: 0.0  # noqa: E731
zeros = _later(nnx.initializers.zeros_init(), 0.0, none)
ones = _later(nnx.initializers.ones_init(), 1.0, none)
# variance 1 / (all axes but the last)
lecun_normal = _later(
    nnx.initializers.lecun_normal(), 0.0, lambda s: math.prod(s[:-1]) ** -0.5 / TRUNCATED
)
embedding_normal = _later(  # of variance 0.02^2
    nnx.initializers.truncated_normal(0.02 / TRUNCATED), 0.0, lambda shape: 0.02 / TRUNCATED
)


def described(network: Callable[..., nnx.Module], *args: Any, **options: Any) -> Any:
    """A network whose arrays are `Start`s."""
    return network(*args, **options, rngs=LATER)


def abstract(network: Callable[..., nnx.Module], *args: Any, **options: Any) -> Any:
    """A network of which shapes alone are known, jax.ShapeDtypeStructs, to be filled."""
    module = described(network, *args, **options)
    state = nnx.state(module)
    nnx.update(module, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state))
    return module


def start_at_zero(variable: nnx.Variable) -> None:
    """Sets an array, described or not, to zeros."""
    variable.set_value(jax.device_put(np.zeros(variable.shape, variable.dtype)))


def drawn(state, seed: int) -> Any:
    """A tree of parameters whose `Start`s are `Tensor`s of that seed, not read yet."""

    def one(path, leaf):
        return leaf.drawn(seed, dotted(path)) if isinstance(leaf, Start) else leaf

    return jax.tree_util.tree_map_with_path(one, state)


def initialised(module: nnx.Module, seed: int) -> Any:
    """A described network, its arrays drawn and on the default device."""

    def placed(leaf):
        return on_device(leaf, leaf.dtype) if isinstance(leaf, Tensor) else leaf

    nnx.update(module, jax.tree.map(placed, drawn(nnx.state(module), seed)))
    return module
