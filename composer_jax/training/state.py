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
    """Parameters, their exponential moving average, the optimizer's state and the step (int32)."""

    params: Any
    ema: Any
    opt_state: Any
    step: jax.Array


def create_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """State at step 0; the average starts as a copy, so that donation never frees it twice."""
    return TrainState(
        params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32)
    )


def make_optimizer(
    learning_rate: float,
    steps: int,
    warmup: int,
    decay: float,
    weight_decay: float,
    clip: float,
    betas: tuple[float, float],
) -> optax.GradientTransformation:
    """AdamW with linear warm-up over `warmup` steps and linear decay over the last part of `steps`.

    `decay`: share of `steps`, 0 for none. `clip`: largest global norm of a gradient.
    """
    falling = round(steps * decay)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.0, falling),
        ],
        [warmup, max(warmup, steps - falling)],
    )
    adam = optax.adamw(schedule, *betas, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adam)
