"""Solvers of the probability-flow ODE: noise to image, and back. Each is a pure step in a scan.

Every solver sees the network as the x0 and eps that its output implies, so one formula holds for
each schedule and prediction, and at both ends (sigma = 1 with alpha = 0; sigma = 0). One scan
iteration is one model evaluation; how many there are compiles, everything else may be traced.

    ddim      x' = alpha' x0 + sqrt(sigma'^2 - std^2) eps + std z      (arXiv 2010.02502, eq. 12)
    euler     ddim without noise: it is Euler's step in sigma/alpha, and in t on the flow schedule
    heun      euler's step, then the mean of both slopes               (arXiv 2206.00364, alg. 1)
    dpmpp2m   two steps' x0 extrapolated in log(alpha/sigma)           (arXiv 2211.01095, alg. 2)
    unipc     dpmpp2m, a step corrected by the evaluation after it     (arXiv 2302.04867, UniPC-2)
    plms      ddim's step of outputs extrapolated over four steps      (arXiv 2202.09778, table 1)

All but ddim and plms go by sigma/alpha, which zero terminal SNR has no value for at t = 1; there
they take 4096, as diffusers' schedulers do. (On the flow schedule their formulas have limits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.process import NEARLY_NONE, TIMESTEPS, Process, is_number, one_of

SOLVERS = ("ddim", "euler", "heun", "dpmpp2m", "unipc", "plms")
TINY = 1e-30
FEW = 15  # steps under which dpmpp2m ends in a step of first order
ADAMS = np.array(  # plms: weights of an output and the three before it, by evaluation
    [[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]],
    np.float32,
) / np.float32(24)  # fmt: skip

Evaluate = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Step(NamedTuple):
    """What one evaluation knows: its index, its process time `at`, and alpha and sigma around it.

    It is made at `here`, for the step from `start` to `end`; the one before started at `before`
    (the first: `start`). `second`: it is the second look of a step, Heun's or plms' first.
    `lower`: the step is the last of a grid that ends at the schedule's least noise.
    """

    index: jax.Array
    at: jax.Array
    here: tuple[jax.Array, jax.Array]
    start: tuple[jax.Array, jax.Array]
    end: tuple[jax.Array, jax.Array]
    before: tuple[jax.Array, jax.Array]
    second: jax.Array
    lower: jax.Array


def solver_evaluations(solver: str, steps: int) -> int:
    """Model evaluations S in so many steps: 2 steps - 1 for heun, one more than steps (from 2) for
    plms, else one a step."""
    one_of("solver", solver, SOLVERS)
    if solver == "plms":
        return steps + (steps > 1)
    return 2 * steps - 1 if solver == "heun" else steps


def evaluation_times(times: np.ndarray, solver: str) -> np.ndarray:
    """The process time of each model evaluation, float32 [S], for a grid `times` [steps + 1].

    On the host; what a guidance plan is built on. For `invert`: of `times[::-1]`.
    """
    step, second = _steps(solver, len(times) - 1)
    return np.asarray(times, np.float32)[step + second]


def sample(
    evaluate: Evaluate,
    x_T: jax.Array,
    times: jax.Array,
    process: Process,
    solver: str = "dpmpp2m",
    key: jax.Array | None = None,
    eta: float | jax.Array = 0.0,
    has_aux: bool = False,
) -> jax.Array | tuple[jax.Array, Any]:
    """Runs a solver from x_T down the grid of times; returns float32 of x_T's shape.

    `evaluate(x, t, index)`: the raw network output at x float32 [B, ...], process time t (scalar),
    evaluation index (scalar int32 below `solver_evaluations`). `times`: float32 [steps + 1] as of
    `Process.times`; it may start below 1 (x_T is x there) and end above 0 (so does the result).
    `eta`: ddim's noise, 0 none, 1 ancestral; it needs a `key`, one or [B] (one an example, so
    that an example's noise does not depend on the batch). `has_aux`: `evaluate` returns (output,
    aux), and the result is (x, aux stacked [S, ...]).

    Raises ValueError for an unknown solver, a grid without a step, or eta that cannot be used.
    """
    one_of("solver", solver, SOLVERS)
    plain = is_number(eta) and eta == 0
    if not plain and solver != "ddim":
        raise ValueError(f"eta is for the solver ddim; {solver} takes none")
    if not plain and key is None:
        raise ValueError("eta needs a key to draw noise from")
    noise = None if plain else (eta, key)
    return run(evaluate, x_T, jnp.asarray(times, jnp.float32), process, solver, noise, has_aux)


def run(evaluate, x, times, process, solver, noise=None, has_aux=False):
    """`sample`, in either direction."""
    advance, steps = stepper(evaluate, times, process, solver, noise, has_aux)
    (x, _), aux = jax.lax.scan(advance, begin(x, solver), steps)
    return (x, aux) if has_aux else x


def begin(x: jax.Array, solver: str) -> tuple[jax.Array, Any]:
    """What a solver carries from evaluation to evaluation, before the first: (x, memory)."""
    x = jnp.asarray(x, jnp.float32)
    zero = jnp.zeros_like(x)
    if solver == "plms":
        return x, (zero,) * 4
    return x, _History(zero, zero, zero, jnp.float32(0.0), False) if solver == "unipc" else zero


def stepper(evaluate, times, process, solver, noise=None, has_aux=False) -> tuple[Callable, Step]:
    """A scan's body, (carry, step) -> (carry, aux), and all steps [S] on the way along `times`."""
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times has shape {times.shape}; [steps + 1] is wanted, steps at least 1")
    update = {
        "ddim": partial(_ddim, noise=noise),
        "euler": partial(_ddim, noise=None),
        "heun": partial(_heun, process=process),
        "plms": partial(_plms, process=process),
        "dpmpp2m": _dpmpp2m,
        "unipc": _unipc,
    }[solver]

    def advance(carry, step):
        x, memory = carry
        output, aux = evaluate(x, step.at, step.index), None
        if has_aux:
            output, aux = output
        output = output.astype(jnp.float32)
        if solver == "plms":
            return update(step, x, output, memory), aux
        x0, eps = process.implied(output, x, *step.here)
        return update(step, x, x0, eps, memory), aux

    count = len(times) - 1
    number, second = _steps(solver, count)
    alpha, sigma = levels(process, times, solver)
    here, start, end, before = (
        (alpha[i], sigma[i])
        for i in (number + second, number, number + 1, np.maximum(number - 1, 0))
    )
    index = jnp.arange(len(number), dtype=jnp.int32)
    at, second = times[number + second], jnp.asarray(second == 1)
    last = (number == count - 1) & (solver == "unipc" or count < FEW)
    lower = jnp.asarray(last) & (times[-1] < 1.5 / TIMESTEPS)
    return advance, Step(index, at, here, start, end, before, second, lower)


def levels(process: Process, times: jax.Array, solver: str) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma at `times`, as the solver takes them."""
    alpha, sigma = process.alpha_sigma(times)
    exact = solver in ("ddim", "plms") or not process.zero_terminal_snr
    return (alpha if exact else jnp.maximum(alpha, NEARLY_NONE)), sigma


def _steps(solver: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each evaluation: its step's number, and whether it is the second in it (0 or 1)."""
    index = np.arange(solver_evaluations(solver, steps))
    if solver == "plms":
        return np.maximum(index - 1, 0), (index == 1).astype(int)
    return (index // 2, index % 2) if solver == "heun" else (index, 0 * index)


def _ddim(step, x, x0, eps, memory, *, noise):
    """`memory` is not used. std is DDIM's, written so that it holds where alpha = 0 too."""
    alpha, sigma = step.end
    if noise is None:
        return alpha * x0 + sigma * eps, memory
    eta, key = noise
    alpha_start, sigma_start = step.start
    shrink = alpha_start * sigma / jnp.maximum(alpha * sigma_start, TINY)
    std = eta * sigma * jnp.sqrt(jnp.maximum(1.0 - shrink**2, 0.0))
    kept = jnp.sqrt(jnp.maximum(sigma**2 - std**2, 0.0))
    return alpha * x0 + kept * eps + std * _normal(key, step.index, x), memory


def _normal(key: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    """Noise of evaluation `index`, of x's shape, from one key or one key an example."""
    if not key.ndim:
        return jax.random.normal(jax.random.fold_in(key, index), x.shape)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), x.shape[1:]))(key)


def _heun(step, x, x0, eps, memory, *, process):
    """`memory`: the first slope. The second look adds half the change of slope to Euler's step.

    The slope is dx/dt = eps - x0 on the flow schedule, else d(x/alpha) by d(sigma/alpha) = eps. Out
    of zero terminal SNR's alpha = 0 the latter is infinitely long, and Euler's step stands.
    """
    (alpha_start, sigma_start), (alpha, sigma) = step.start, step.end
    if process.schedule == "flow":
        slope, length = eps - x0, sigma - sigma_start
    else:
        finite = alpha_start > (1e-3 if process.zero_terminal_snr else 0.0)
        ratio = sigma_start / jnp.where(finite, alpha_start, 1.0)
        slope, length = eps, jnp.where(finite, sigma - alpha * ratio, 0.0)
    first = alpha * x0 + sigma * eps
    return jnp.where(step.second, x + 0.5 * length * (slope - memory), first), slope


def _plms(step, x, output, memory, *, process):
    """`memory`: x where the first step started, and the outputs of the three steps before.

    The first step is made again when its end was looked at, with the mean of both outputs.
    """
    first, *before = memory
    weights = jnp.asarray(ADAMS)[jnp.minimum(step.index, len(ADAMS) - 1)]
    mixed = sum(weight * one for weight, one in zip(weights, (output, *before), strict=True))
    from_x = jnp.where(step.second, first, x)
    x0, eps = process.implied(mixed, from_x, *step.start)
    newer = (output, *before[:-1])
    known = [jnp.where(step.second, *pair) for pair in zip(before, newer, strict=True)]
    first = jnp.where(step.index == 0, x, first)
    return step.end[0] * x0 + step.end[1] * eps, (first, *known)


def _dpmpp2m(step, x, x0, eps, memory):
    """`memory`: x0 of the step before."""
    del eps
    return _extrapolated(step, x, x0, memory), x0


def _extrapolated(step: Step, x, x0, x0_before) -> jax.Array:
    """A step with x0 extrapolated from the step before, in log(alpha/sigma).

    First order (ddim's step) in the first step, in the one after alpha = 0, to sigma = 0, where
    log(alpha/sigma) has no finite step, and where the step says so.
    """
    h, h_before = _log_step(step.start, step.end), _log_step(step.before, step.start)
    second = _has_before(step) & (step.end[1] > 0.0) & ~step.lower
    gain = jnp.where(second, 0.5 * h / jnp.where(second, h_before, 1.0), 0.0)
    ratio, share = _exponential(step.start, step.end)
    return ratio * x + share * (x0 + gain * (x0 - x0_before))


def _has_before(step: Step) -> jax.Array:
    """Whether the step before was one, of finite length."""
    return (_log_step(step.before, step.start) > 0.0) & (step.before[0] > 0.0)


def _exponential(start, end) -> tuple[jax.Array, jax.Array]:
    """What a step takes of x, and what of an x0 that does not change (arXiv 2211.01095, eq. 9)."""
    ratio = end[1] / jnp.maximum(start[1], TINY)
    return ratio, end[0] - start[0] * ratio


class _History(NamedTuple):
    """What unipc's corrector knows of the step before: where that step started (x, corrected), x0
    there, x0 of the step before it, how far that one was in log(alpha/sigma), if it was one."""

    x: jax.Array
    x0: jax.Array
    x0_before: jax.Array
    h_before: jax.Array
    second: jax.Array


def _unipc(step, x, x0, eps, memory: _History):
    """Corrects how x came to be, now that x0 is known here, then steps on as dpmpp2m does."""
    del eps
    x = jnp.where(step.index > 0, _corrected(step, x0, memory), x)
    known = _History(
        x, x0, memory.x0, _log_step(step.before, step.start), _has_before(step) & (step.end[1] > 0)
    )
    return _extrapolated(step, x, x0, memory.x0), known


def _corrected(step, x0, memory: _History) -> jax.Array:
    """UniC-p (arXiv 2302.04867, eq. 9 with B(h) = e^h - 1), p the order of the step before.

    The weights of the differences solve eq. 10; for p = 1 theirs is 1/2.
    """
    h = _log_step(step.before, step.start)
    second = memory.second
    r = jnp.where(second, -memory.h_before / jnp.where(h > 0.0, h, 1.0), -1.0)
    phi_1, phi_2, phi_3 = _phi(-jnp.minimum(h, 80.0))
    b_1, b_2 = phi_2 / phi_1, 2.0 * phi_3 / phi_1
    older = jnp.where(second, (b_2 - b_1) / (r - 1.0), 0.0)
    newer = jnp.where(second, b_1 - older, 0.5)
    change = older * (memory.x0_before - memory.x0) / r + newer * (x0 - memory.x0)
    ratio, share = _exponential(step.before, step.start)
    return ratio * memory.x + share * (memory.x0 + change)


def _phi(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """phi_1 = (e^z - 1) / z, phi_k+1 = (phi_k - 1/k!) / z for z below 0, by series near 0."""
    near = jnp.abs(z) < 1.0
    small, far = jnp.where(near, z, 0.0), jnp.where(near, -1.0, z)
    series = [sum(small**n / math.factorial(n + k) for n in range(9)) for k in (1, 2, 3)]
    phi_1 = jnp.expm1(far) / far
    phi_2 = (phi_1 - 1.0) / far
    phi_3 = (phi_2 - 0.5) / far
    return tuple(
        jnp.where(near, one, other)
        for one, other in zip(series, (phi_1, phi_2, phi_3), strict=True)
    )


def _log_step(start, end) -> jax.Array:
    """By how much log(alpha/sigma) grows; large but finite where alpha or sigma is 0."""
    (alpha_start, sigma_start), (alpha, sigma) = jax.tree.map(
        lambda value: jnp.log(jnp.maximum(value, TINY)), (start, end)
    )
    return (alpha - alpha_start) - (sigma - sigma_start)
