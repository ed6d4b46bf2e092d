"""The loss on data that is never trained on: what tells learning from memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from composer_jax.training.loop import Hook
from composer_jax.training.sharding import gathered, to_devices
from composer_jax.training.state import TrainState
from composer_jax.training.step import Loss, example_keys


def held_out_loss(
    loss: Loss, batch: Callable[[int], Any], count: int, seed: int, dtype: str
) -> Hook:
    """A hook that gives the exponential average's mean loss, `held_out_loss`, over `count` batches.

    `batch(i)`: this process's part of batch i, numpy arrays. Noise, times and dropped conditions
    are drawn anew for each example, but the same at every call: numbers of different steps compare.
    What else the loss tells is named alike.
    """
    evaluate: Callable | None = None

    def hook(step: int, state: TrainState) -> dict[str, float]:
        nonlocal evaluate
        del step
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.ema)
        mesh = jax.tree.leaves(shardings)[0].mesh
        if evaluate is None:
            evaluate = jax.jit(partial(_evaluate, loss=loss, shardings=shardings, dtype=dtype))
        with jax.set_mesh(mesh):
            rows = [
                evaluate(state.ema, to_devices(batch(i), mesh), np.uint32(seed), np.uint32(i))
                for i in range(count)
            ]
        return {f"held_out_{key}": float(np.mean([row[key] for row in rows])) for key in rows[0]}

    return hook


def _evaluate(params, batch, seed, index, *, loss: Loss, shardings, dtype: str) -> dict:
    key = jax.random.fold_in(jax.random.key(seed), index)
    keys = example_keys(key, len(jax.tree.leaves(batch)[0]))
    value, metrics = loss(gathered(params, shardings, dtype), batch, keys)
    return {"loss": value, **metrics}
