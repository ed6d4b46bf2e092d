"""One train step, the same for codec, CLIP and composer: gradient, optimizer, moving average."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from composer_jax.models.files import dotted
from composer_jax.training.ema import average
from composer_jax.training.sharding import gathered
from composer_jax.training.state import TrainState
from composer_jax.utils.seeds import key_of

# of parameters, a batch and a key for each of its examples: the loss of each example [B], and
# numbers of each for the log. The loss of a batch is their mean, however the batch is cut.
Loss = Callable[[dict, dict, jax.Array], tuple[jax.Array, dict]]


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """A key for each example of a batch: a function of the key and the example's index alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def in_parts(tree, parts: int):
    """A batch [B, ...] as [parts, B / parts, ...]: every device's examples stay on it, as part i
    takes each `parts`-th."""

    def split(leaf):
        return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


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


def jit_step(
    shardings: TrainState,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int,
    dtype: str,
):
    """`train_step`, jitted for a state that lies as `shardings` say and is used up."""
    step = partial(
        train_step,
        loss=lambda params, *rest: loss(gathered(params, shardings.params, dtype), *rest),
        optimizer=optimizer,
        ema_decay=ema_decay,
        accumulate=accumulate,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train_step(
    state: TrainState,
    batch: dict,
    seed: jax.Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
) -> tuple[TrainState, dict]:
    """One step; returns the new state and scalars (loss, the loss's own, norms).

    Pure. `seed`: its words, uint32 [2]. Randomness is `fold_in(key_of(seed), state.step)` and the
    example's index. `accumulate`:
    into how many parts the batch is taken, one after the other, for a gradient that needs less
    memory; the result is the same. The exponential average warms up: its decay is
    min(ema_decay, (1 + n) / (10 + n)).
    """
    key = jax.random.fold_in(key_of(seed), state.step)
    keys = example_keys(key, len(jax.tree.leaves(batch)[0]))
    metrics, gradient = _gradient(loss, state.params, batch, keys, accumulate)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)
    averages = {
        length: average(old, params, state.step + 1, float(length))
        for length, old in state.averages.items()
    }
    # apart, or XLA for TPUs splits the update of parameters, moments and averages in two
    apart = jax.lax.optimization_barrier(updates)
    metrics |= {"grad_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(apart)}
    return TrainState(params, ema, averages, opt_state, state.step + 1), metrics


def _gradient(loss: Loss, params, batch, keys, parts: int) -> tuple[dict, Any]:
    """Metrics and gradient over a batch that is taken in `parts`."""

    def mean(params, examples, keys):
        values, metrics = loss(params, examples, keys)
        return jnp.mean(values), jax.tree.map(jnp.mean, metrics)

    def of(part):
        examples, bits = part
        own = jax.random.wrap_key_data(bits)
        (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(params, examples, own)
        return {"loss": value, **metrics}, gradient

    whole = batch, jax.random.key_data(keys)
    if parts == 1:
        return of(whole)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of(part)), None

    every = in_parts(whole, parts)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), every)
    shapes = jax.eval_shape(of, one)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, every)
    return jax.tree.map(lambda leaf: leaf / parts, total)
