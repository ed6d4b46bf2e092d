"""Inversion: the noise that a solver makes an image from, under any conditions.

plain        the same ODE upwards, each step from what the network says at its start
             (arXiv 2105.05233, appendix F)
fixed_point  each step solves for the x that the solver's own step brings back to where it
             stands, starting from the slope of the step before (arXiv 2309.04907)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.process import Process, one_of
from composer_jax.diffusion.solvers import (
    Evaluate,
    begin,
    evaluation_times,
    levels,
    run,
    solver_evaluations,
    stepper,
)

SOLVERS = ("ddim", "euler", "heun")  # the others' steps depend on the steps before
WAYS = {"plain": SOLVERS, "fixed_point": SOLVERS}
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
    of `inversion_times`. `iterations`: of each step of a fixed point, each as dear as the solver's
    own step; the first has one more. Raises ValueError for an unknown way or number of them, and
    for a solver that cannot be inverted.
    """
    _check(solver, way)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; a whole number from 1 is wanted")
    times = jnp.asarray(times, jnp.float32)
    if way == "plain":
        return run(evaluate, x0, times[::-1], process, solver)
    advance, steps = stepper(evaluate, times, process, solver)
    alpha, sigma = levels(process, times, solver)
    last, looks = len(times) - 2, 2 if solver == "heun" else 1

    def down(x, number):
        """The solver's own step, from times[number]; Heun's last one has one look."""
        first = looks * number
        stop = jnp.minimum(first + looks, solver_evaluations(solver, last + 1))

        def look(index, carry):
            return advance(carry, jax.tree.map(lambda leaf: leaf[index], steps))[0]

        return jax.lax.fori_loop(first, stop, look, begin(x, solver))[0]

    def up(carry, number):
        """From x at times[number + 1] to x at times[number].

        ddim's step is of_x x + of_output output. Held to that form, any step has an output; the
        output of one step is the first guess of the next.
        """
        x_end, output = carry

        def share(output, x):
            x0, eps = process.implied(output, x, alpha[number], sigma[number])
            return alpha[number + 1] * x0 + sigma[number + 1] * eps

        of_output, of_x = share(1.0, 0.0), jnp.maximum(share(0.0, 1.0), 0.1)

        def closer(_, x):
            return x + (x_end - down(x, number)) / of_x

        x = (x_end - of_output * output) / of_x
        x = jax.lax.fori_loop(0, iterations + (number == last), closer, x)
        moved = of_output != 0.0
        found = (x_end - of_x * x) / jnp.where(moved, of_output, 1.0)
        return (x, jnp.where(moved, found, output)), None

    x0 = jnp.asarray(x0, jnp.float32)
    numbers = jnp.arange(last, -1, -1, dtype=jnp.int32)
    (x_T, _), _ = jax.lax.scan(up, (x0, jnp.zeros_like(x0)), numbers)
    return x_T


def _check(solver: str, way: str) -> None:
    one_of("way of inversion", way, tuple(WAYS))
    one_of(f"solver for {way} inversion", solver, WAYS[way])
