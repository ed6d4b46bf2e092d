"""What training carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from composer_jax.models.files import Tensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, their averages, the optimizer's state and the step (int32).

    `ema`: the exponential moving average, which is exported; `averages`: those of power functions,
    by length, for any other length afterwards (`training/ema.py`).
    """

    params: Any
    ema: Any
    averages: dict[str, Any]
    opt_state: Any
    step: jax.Array


def create_state(params, optimizer: optax.GradientTransformation, lengths=()) -> TrainState:
    """State at step 0; averages start as copies, so that donation never frees anything twice."""
    ema, *averages = (jax.tree.map(jnp.copy, params) for _ in (None, *lengths))
    named = {f"{length:g}": one for length, one in zip(lengths, averages, strict=True)}
    return TrainState(params, ema, named, optimizer.init(params), jnp.zeros((), jnp.int32))


def abstract_state(params, optimizer: optax.GradientTransformation, lengths=()) -> TrainState:
    """Shapes and dtypes of `create_state`; of `params`, arrays or `Tensor`s, none is read."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    return jax.eval_shape(partial(create_state, optimizer=optimizer, lengths=lengths), shapes)


def start_state(
    params, optimizer: optax.GradientTransformation, lengths, shardings: TrainState
) -> TrainState:
    """`create_state` laid out as `shardings` say: each process reads its own parts of `params`,
    arrays or `Tensor`s, and no program is compiled but to copy and to fill with zeros."""
    placed = jax.tree.map(_place, params, shardings.params)
    return jax.device_put(create_state(placed, optimizer, lengths), shardings)


def _place(leaf, sharding) -> jax.Array:
    if isinstance(leaf, Tensor) and leaf.read_part:
        read: dict[str, np.ndarray] = {}  # devices that hold the same part share it

        def part(index):
            if str(index) not in read:
                read[str(index)] = leaf.part(index)
            return read[str(index)]
    else:
        part = (leaf.read() if isinstance(leaf, Tensor) else np.asarray(leaf)).__getitem__
    return jax.make_array_from_callback(leaf.shape, sharding, part)
