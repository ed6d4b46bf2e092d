"""The compiled train step, its program kept for the next start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from composer_jax.storage.programs import (
    kept_program,
    kept_programs,
    program_name,
)
from composer_jax.training.state import TrainState

ROOMS = ("conditions", "diffusion", "models", "training", "utils")  # whose code a step is made of


def compile_step(
    jitted: Callable, state: TrainState, batch: Any, seed: Any, options: dict, about: Any
) -> tuple[Callable, Any]:
    """The step `jitted(state, batch, seed)` compiled with the compiler's `options`: a function of
    the same, and what jax knows of the compiled program.

    `about`: all that its trace depends on but our code and these arguments' shapes and shardings,
    as JSON's types; the traced program is then kept beside JAX's persistent compilation cache,
    where that is on and this is the job's only process. None: it is not kept.
    """
    keep = kept_programs()
    if about is None or keep is None or jax.process_count() > 1:
        compiled = jitted.lower(state, batch, seed).compile(options)
        return compiled, compiled

    def flat(state_leaves: list, batch_leaves: list, seed):
        new, metrics = jitted(
            jax.tree.unflatten(tree, state_leaves),
            jax.tree.unflatten(batch_tree, batch_leaves),
            seed,
        )
        return jax.tree.leaves(new), metrics

    (state_leaves, tree), (batch_leaves, batch_tree) = map(jax.tree.flatten, (state, batch))
    places = [[leaf.sharding for leaf in leaves] for leaves in (state_leaves, batch_leaves)]
    trees = [str(tree), str(batch_tree), str(places)]
    inputs = state_leaves, batch_leaves, seed
    path = keep / program_name(ROOMS, [about, trees], inputs)
    kept = kept_program(path, jax.jit(flat, in_shardings=(*places, None)), *inputs)
    outputs = places[0], None
    again = jax.jit(kept, donate_argnums=0, out_shardings=outputs)
    compiled = again.lower(*inputs).compile(options)

    def step(state, batch, seed):
        leaves, metrics = compiled(jax.tree.leaves(state), jax.tree.leaves(batch), seed)
        return jax.tree.unflatten(tree, leaves), metrics

    return step, compiled
