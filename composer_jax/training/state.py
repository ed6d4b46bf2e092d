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


def abstract_state(params, optimizer: optax.GradientTransformation, lengths=()) -> TrainState:
    """Shapes and dtypes of `start_state`; of `params`, arrays or `Tensor`s, none is read."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    averages = {f"{length:g}": shapes for length in lengths}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(shapes, shapes, averages, jax.eval_shape(optimizer.init, shapes), step)


def start_state(
    params, optimizer: optax.GradientTransformation, lengths, shardings: TrainState
) -> TrainState:
    """The state at step 0, laid out as `shardings` say; no two arrays share memory, which a step
    would be given twice.

    Each process reads its own parts of `params`, arrays or `Tensor`s, and nothing is compiled for
    the shape of an array.
    """
    shapes = abstract_state(params, optimizer, lengths)
    placed = jax.tree.map(_place, params, shardings.params)
    copy = partial(jax.device_put, may_alias=False)
    ema = jax.tree.map(copy, placed, shardings.ema)
    averages = {length: jax.tree.map(copy, placed, of) for length, of in shardings.averages.items()}
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    values = _constants(shapes.params, optimizer)
    if values is None:
        opt_state = jax.tree.map(copy, optimizer.init(placed), shardings.opt_state)
    else:
        opt_state = jax.tree.map(_filled, values, shapes.opt_state, shardings.opt_state)
    return TrainState(placed, ema, averages, opt_state, step)


def _constants(shapes, optimizer: optax.GradientTransformation):
    """What the optimizer's state begins with, an element for each array that is as large as a
    parameter; None where it depends on parameters. Asked of arrays of one element each."""

    def begins(value: float):
        ones = jax.tree.map(lambda s: jnp.full((1,) * len(s.shape), value, s.dtype), shapes)
        return jax.device_get(optimizer.init(ones))

    first, second = begins(1.0), begins(2.0)
    same = jax.tree.leaves(jax.tree.map(np.array_equal, first, second))
    return first if all(same) else None


def _filled(value: np.ndarray, shape: jax.ShapeDtypeStruct, sharding) -> jax.Array:
    whole = np.broadcast_to(value, shape.shape)
    return jax.make_array_from_callback(shape.shape, sharding, whole.__getitem__)


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
