"""Inversion: the noise that a solver would have made an image from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.process import Process, one_of
from composer_jax.diffusion.solvers import Evaluate, evaluation_times, run

INVERTIBLE = ("ddim", "euler")
WAYS = ("plain",)
SOLVER, WAY = "ddim", "plain"


def inversion_times(times: np.ndarray, solver: str = SOLVER, way: str = WAY) -> np.ndarray:
    """The process time of each model evaluation of `invert`, by its index; float32 [S]."""
    one_of("way of inversion", way, WAYS)
    return evaluation_times(np.asarray(times)[::-1], solver)


def invert(
    evaluate: Evaluate,
    x0: jax.Array,
    times: jax.Array,
    process: Process,
    solver: str = SOLVER,
    way: str = WAY,
) -> jax.Array:
    """The same ODE upwards: the x_T from which `sample` (without noise) comes back to about x0.

    Arguments as for `sample`, `times` from 1 to 0 likewise; evaluation 0 is the one at the last of
    them (arXiv 2105.05233, appendix F). Raises ValueError for a solver other than ddim and euler.
    """
    one_of("solver for inversion", solver, INVERTIBLE)
    one_of("way of inversion", way, WAYS)
    return run(evaluate, x0, jnp.asarray(times, jnp.float32)[::-1], process, solver)
