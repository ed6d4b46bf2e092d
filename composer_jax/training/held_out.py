"""The loss on data that is never trained on: what tells learning from memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.training.loop import Hook
from composer_jax.training.sharding import gathered, to_devices
from composer_jax.training.state import TrainState
from composer_jax.training.step import Loss, example_keys, in_parts
from composer_jax.utils.seeds import key_of, seed_words


def held_out_loss(
    loss: Loss,
    batch: Callable[[int], Any],
    count: int,
    size: int,
    part: tuple[int, int],
    seed: int,
    dtype: str,
    accumulate: int = 1,
) -> Hook:
    """A hook that gives the average's mean loss over `count` examples, as `held_out_loss`.

    `batch(i)`: this process's part, `part` (index, how many), of batch i of `size` examples, numpy
    arrays. Each example counts once: what fills the last batch up does not count. Noise, times and
    dropped conditions are drawn anew for each example, but the same at every call: numbers of
    different steps compare. What else the loss tells is named alike. `accumulate`: parts that a
    batch is taken in, as in training.
    """
    evaluate: Callable | None = None
    words = seed_words(seed)
    local = size // part[1]

    def counted(i: int, mesh):
        """Batch i and which of its examples count, on the mesh's devices."""
        rows = i * size + part[0] * local + np.arange(local)
        return to_devices((batch(i), (rows < count).astype(np.float32)), mesh)

    def hook(step: int, state: TrainState) -> dict[str, float]:
        nonlocal evaluate
        del step
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.ema)
        mesh = jax.tree.leaves(shardings)[0].mesh
        if evaluate is None:
            options = {"loss": loss, "shardings": shardings, "dtype": dtype, "parts": accumulate}
            evaluate = jax.jit(partial(_evaluate, **options))
        rows, upcoming, batches = [], counted(0, mesh), -(-count // size)
        with jax.set_mesh(mesh):
            for i in range(batches):
                row = evaluate(state.ema, *upcoming, words, np.uint32(i))
                if i + 1 < batches:  # the host makes the next batch while the device works
                    upcoming = counted(i + 1, mesh)
                rows.append(jax.device_get(row))
        return {f"held_out_{key}": float(sum(row[key] for row in rows)) / count for key in rows[0]}

    return hook


def _evaluate(
    params, batch, counts, seed, index, *, loss: Loss, shardings, dtype, parts: int
) -> dict:
    """Sums over the examples that count."""
    key = jax.random.fold_in(key_of(seed), index)
    keys = example_keys(key, len(jax.tree.leaves(batch)[0]))
    params = gathered(params, shardings, dtype)

    def of(part):
        examples, counts_B, bits = part
        values, metrics = loss(params, examples, jax.random.wrap_key_data(bits))
        rows = {"loss": values, **metrics}
        return jax.tree.map(lambda row_B: jnp.sum(jnp.where(counts_B > 0, row_B, 0.0)), rows)

    rows = jax.lax.map(of, in_parts((batch, counts, jax.random.key_data(keys)), parts))
    return jax.tree.map(jnp.sum, rows)
