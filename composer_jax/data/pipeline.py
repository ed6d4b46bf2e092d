"""Batches as a pure function of (seed, step): resuming anywhere costs what starting costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np


def batches(
    pool: Any, batch: int, seed: int, part: tuple[int, int] = (0, 1)
) -> Callable[[int], Any]:
    """`batch(step)`: the rows of one part of the global batch of that step.

    `pool`: a tree of arrays with a leading axis of N examples. Each epoch is a permutation of its
    own; batches run across the border of epochs, so `batch` may exceed N. `part`: (index, how
    many); raises ValueError where `batch` cannot be split into so many.
    """
    index, parts = part
    if batch % parts:
        raise ValueError(f"batch {batch} is not a multiple of {parts} parts")
    local = batch // parts
    count = len(jax.tree.leaves(pool)[0])

    @lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        return generator.permutation(count)

    def at(step: int) -> Any:
        first = step * batch + index * local
        positions = np.arange(first, first + local)
        rows = np.array([order(p // count)[p % count] for p in positions.tolist()])
        return jax.tree.map(lambda a: a[rows], pool)

    return at
