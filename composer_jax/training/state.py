"""What training carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


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
