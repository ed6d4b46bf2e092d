"""Inversion: the noise that a solver makes an image from, under any conditions.

plain        the same ODE upwards, each step from what the network says at its start
             (arXiv 2105.05233, appendix F)
fixed_point  each step solves for the x that the solver's own step brings back to where it
             stands, starting from the last step's slope (arXiv 2309.04907)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.process import Process, one_of
from composer_jax.diffusion.solvers import Evaluate, evaluation_times, run

WAYS = {"plain": ("ddim", "euler", "heun"), "fixed_point": ("ddim", "euler")}
SOLVER, WAY, ITERATIONS = "ddim", "fixed_point", 3


def inversion_times(times: np.ndarray, solver: str = SOLVER, way: str = WAY) -> np.ndarray:
    """The process time of each model evaluation of `invert`, by its index; float32 [S].

    A fixed point asks for the evaluations that `sample` makes, under the same indices, several
    times each; plain inversion for those of the grid upside down.
    """
    _check(solver, way)
    return evaluation_times(times if way == "fixed_point" else np.asarray(times)[::-1], solver)


def invert(
    evaluate: Evaluate,
    x0: jax.Array,
    times: jax.Array,
    process: Process,
    solver: str = SOLVER,
    way: str = WAY,
    iterations: int = ITERATIONS,
) -> jax.Array:
    """The x_T from which `sample` (without noise) comes back to x0; float32 of x0's shape.

    Arguments as for `sample`, `times` from 1 to 0 likewise; `evaluate` is asked for the evaluations
    of `inversion_times`. `iterations`: evaluations for each step of a fixed point. Raises
    ValueError for an unknown way, and for a solver that it does not support.
    """
    _check(solver, way)
    times = jnp.asarray(times, jnp.float32)
    if way == "plain":
        return run(evaluate, x0, times[::-1], process, solver)
    alpha, sigma = process.alpha_sigma(times)

    def up(carry, index):
        """From x at times[index + 1] to x at times[index]; the step is linear in x and output."""
        x_end, output = carry
        end = alpha[index + 1], sigma[index + 1]

        def share(output, x):
            x0, eps = process.x0_eps(jnp.float32(output), jnp.float32(x), times[index])
            return end[0] * x0 + end[1] * eps

        of_output, of_x = share(1.0, 0.0), share(0.0, 1.0)

        def refine(_, output):
            x = (x_end - of_output * output) / of_x
            return evaluate(x, times[index], index).astype(jnp.float32)

        output = jax.lax.fori_loop(0, iterations, refine, output)
        return ((x_end - of_output * output) / of_x, output), None

    x0 = jnp.asarray(x0, jnp.float32)
    last = len(times) - 2
    start = (x0, evaluate(x0, times[last], jnp.int32(last)).astype(jnp.float32))
    (x_T, _), _ = jax.lax.scan(up, start, jnp.arange(last, -1, -1, dtype=jnp.int32))
    return x_T


def _check(solver: str, way: str) -> None:
    one_of("way of inversion", way, tuple(WAYS))
    one_of(f"solver for {way} inversion", solver, WAYS[way])
