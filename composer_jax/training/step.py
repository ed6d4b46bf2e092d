"""One train step, the same for codec, CLIP and composer: gradient, optimizer, moving average."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from composer_jax.training.sharding import dotted
from composer_jax.training.state import TrainState

# of parameters, a batch and a key for each of its examples: the mean loss, and scalars for the log
Loss = Callable[[dict, dict, jax.Array], tuple[jax.Array, dict]]


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """A key for each example of a batch: a function of the key and the example's index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def only(
    pattern: str, loss: Loss, optimizer: optax.GradientTransformation
) -> tuple[Loss, optax.GradientTransformation]:
    """Loss and optimizer that train what `pattern`, a regular expression, finds, and no more.

    It is searched in the dotted paths of parameters; "" finds all. The others get no gradient, no
    weight decay and no optimizer state. Raises ValueError, when called, where it finds none.
    """

    def trains(params):
        found = jax.tree_util.tree_map_with_path(
            lambda path, _: re.search(pattern, dotted(path)) is not None, params
        )
        if not any(jax.tree.leaves(found)):
            raise ValueError(f"trainable {pattern!r} finds no parameter")
        return found

    def part(params, batch, keys):
        held = jax.tree.map(
            lambda on, p: p if on else jax.lax.stop_gradient(p), trains(params), params
        )
        return loss(held, batch, keys)

    return part, optax.masked(optimizer, trains)


def train_step(
    state: TrainState,
    batch: dict,
    seed: jax.Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, dict]:
    """One step; returns the new state and scalars (loss, the loss's own metrics, grad_norm).

    Pure. Randomness is `fold_in(key(seed), state.step)` and the example's index. The
    average warms up: decay is min(ema_decay, (1 + n) / (10 + n)).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = example_keys(key, len(jax.tree.leaves(batch)[0]))
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, keys)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)
    metrics = {"loss": value, **metrics, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(params, ema, opt_state, state.step + 1), metrics
