"""The process: how much signal and noise x_t holds, and what the network predicts of it.

x_t = alpha(t) x0 + sigma(t) eps, with t in [0, 1]: 0 is clean, 1 is (all but) noise. Everything a
solver, a loss or a guidance rule asks for follows from alpha, sigma and the raw network output.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.diffusion.grids import (
    FINALS,
    MULTISTEP,
    RAMPS,
    SPACINGS,
    ramp,
    shifted,
    trained_steps,
)

PREDICTIONS = ("flow", "eps", "v")
SCHEDULES = ("flow", "sd")
DENSITIES = ("logit-normal", "uniform")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")  # diffusers' names
BETAS = ("beta_schedule", "beta_start", "beta_end")
MEANING = ("prediction", "schedule", "zero_terminal_snr", *BETAS)
TIMESTEPS = 1000  # of Stable Diffusion's schedule
LOCATION = 10.0  # the most that training times may be shifted: by then all are noise, or none
NEARLY_NONE = 2.0**-12  # the alpha that sigma/alpha is taken at where alpha is 0, diffusers' too


@dataclass(frozen=True)
class Process:
    """Schedule and prediction; hashable, JSON both ways.

    `prediction`: "flow" (eps - x0; arXiv 2209.03003), "eps" (arXiv 2006.11239) or "v"
    (alpha eps - sigma x0; arXiv 2202.00512). `schedule`: "flow" (alpha = 1 - t, sigma = t) or "sd"
    (Stable Diffusion's 1000 steps, t = (i + 1) / 1000 being step i). `zero_terminal_snr`: rescales
    "sd" so that alpha(1) = 0 (arXiv 2305.08891, algorithm 1). `beta_schedule`, `beta_start`,
    `beta_end` of "sd": the betas of its steps, "scaled_linear" (the squares of even steps between
    their roots; Stable Diffusion's), "linear" (arXiv 2006.11239) or "squaredcos_cap_v2" (cosine,
    arXiv 2102.09672, which has no start and end). `min_snr`: gamma of min-SNR loss
    weights (arXiv 2303.09556), None for none. `density`: how the flow schedule's training times
    are drawn, "logit-normal" (arXiv 2403.03206, eq. 19) or "uniform"; `location` is added to their
    logits (above 0: nearer to noise; of uniform times, eq. 23 there with a shift of e^location).
    MEANING names the fields that say what a network's output means; the others say how it trains.

    Raises ValueError for anything else, and for "eps" where alpha(1) = 0: there the noise says
    nothing about x0.
    """

    prediction: str = "flow"
    schedule: str = "flow"
    zero_terminal_snr: bool = False
    min_snr: float | None = None
    density: str = "logit-normal"
    location: float = 0.0
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self):
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("density", self.density, DENSITIES)
        one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        start, end = self.beta_start, self.beta_end
        if not (is_number(start) and is_number(end) and 0 < start <= end < 1):
            raise ValueError(
                f"beta_start is {start!r} and beta_end {end!r}; 0 < beta_start <= beta_end < 1 is "
                "wanted"
            )
        if not isinstance(self.zero_terminal_snr, bool):
            raise ValueError(f"zero_terminal_snr is {self.zero_terminal_snr!r}; true or false")
        if self.zero_terminal_snr and self.schedule != "sd":
            raise ValueError('zero_terminal_snr is for schedule "sd"; "flow" has none to remove')
        if self.prediction == "eps" and (self.schedule == "flow" or self.zero_terminal_snr):
            raise ValueError('prediction "eps" cannot start from pure noise; use "v" or "flow"')
        if not is_number(self.location) or abs(self.location) > LOCATION:
            raise ValueError(
                f"location is {self.location!r}; a number from -{LOCATION} to {LOCATION} is wanted"
            )
        if self.location and self.schedule != "flow":
            raise ValueError('location is for schedule "flow"; "sd" draws its steps evenly')
        gamma = self.min_snr
        if gamma is not None and not (is_number(gamma) and gamma > 0):
            raise ValueError(f"min_snr is {gamma!r}; a number above 0, or none")

    def to_dict(self) -> dict:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> Process:
        """From `to_dict`'s result; keys may be left out. Raises ValueError for an unknown one."""
        for key in values:
            one_of("process key", key, tuple(f.name for f in fields(cls)))
        return cls(**values)

    def alpha(self, t) -> jax.Array:
        """The share of x0 in x_t, float32 in [0, 1], of t's shape."""
        return self.alpha_sigma(t)[0]

    def sigma(self, t) -> jax.Array:
        """The share of eps in x_t, float32 in [0, 1], of t's shape."""
        return self.alpha_sigma(t)[1]

    def alpha_sigma(self, t) -> tuple[jax.Array, jax.Array]:
        """Both at once."""
        t = jnp.asarray(t, jnp.float32)
        if self.schedule == "flow":
            return 1.0 - t, t
        # Straight lines between the schedule's points, put back on alpha^2 + sigma^2 = 1.
        position = jnp.clip(t, 0.0, 1.0) * TIMESTEPS
        step = jnp.minimum(position.astype(jnp.int32), TIMESTEPS - 1)
        table, part = jnp.asarray(self._table()), position - step
        alpha, sigma = (
            column[step] * (1.0 - part) + column[step + 1] * part for column in (table[0], table[1])
        )
        length = jnp.sqrt(alpha**2 + sigma**2)
        return alpha / length, sigma / length

    def timestep(self, t) -> jax.Array:
        """What the network is told of t: 1000 t, or SD's step, 1000 t - 1, at least 0."""
        t = jnp.asarray(t, jnp.float32)
        if self.schedule == "flow":
            return TIMESTEPS * t
        return jnp.maximum(TIMESTEPS * t - 1.0, 0.0)

    def diffuse(self, x0: jax.Array, eps: jax.Array, t) -> jax.Array:
        """x_t; `t` a scalar or of x0's rank, broadcastable (so for the next two)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def target(self, x0: jax.Array, eps: jax.Array, t) -> jax.Array:
        """What the network should output at x_t."""
        alpha, sigma = self.alpha_sigma(t)
        return {"flow": eps - x0, "eps": eps, "v": alpha * eps - sigma * x0}[self.prediction]

    def x0_eps(self, output: jax.Array, x_t: jax.Array, t) -> tuple[jax.Array, jax.Array]:
        """The (x0, eps) that a raw network output at x_t implies; finite for every t in [0, 1]."""
        return self.implied(output, x_t, *self.alpha_sigma(t))

    def implied(self, output, x_t, alpha, sigma) -> tuple[jax.Array, jax.Array]:
        """`x0_eps` of an alpha and sigma of one's own."""
        if self.prediction == "eps":
            return (x_t - sigma * output) / alpha, output
        if self.prediction == "v":
            power = alpha**2 + sigma**2
            return (alpha * x_t - sigma * output) / power, (sigma * x_t + alpha * output) / power
        total = alpha + sigma
        return (x_t - sigma * output) / total, (x_t + alpha * output) / total

    def sample_times(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Training times, float32: by `density`, or SD's steps evenly."""
        if self.schedule == "flow" and self.density == "uniform":
            u = jax.random.uniform(key, shape)
            return u / (u + math.exp(-self.location) * (1.0 - u))
        if self.schedule == "flow":
            return jax.nn.sigmoid(self.location + jax.random.normal(key, shape))
        step = jax.random.randint(key, shape, 1, TIMESTEPS + 1)
        return step.astype(jnp.float32) / TIMESTEPS

    def loss_weight(self, t) -> jax.Array:
        """Factor of the squared error of the output at t, of t's shape.

        Without `min_snr` ones, and for "v" on the flow schedule, whose alpha and sigma have squares
        that do not add up to 1, what makes its loss that of the flow. With it min(SNR, gamma) as a
        weight of the squared error of x0 (arXiv 2303.09556, section 3.4), carried over to this
        prediction; finite for every t in [0, 1].
        """
        alpha, sigma = self.alpha_sigma(t)
        power = alpha**2 + sigma**2
        if self.min_snr is None:
            uneven = self.prediction == "v" and self.schedule == "flow"
            return power**-2 if uneven else jnp.ones_like(alpha)
        slope = {"flow": alpha + sigma, "eps": alpha, "v": power}[self.prediction]
        return jnp.minimum(alpha**2, self.min_snr * sigma**2) / slope**2

    def times(
        self,
        steps: int,
        spacing: str = "uniform",
        start: float = 1.0,
        *,
        solver: str = "ddim",
        steps_offset: int = 0,
        final: str = "zero",
        shift: float = 1.0,
    ) -> np.ndarray:
        """A solver's grid on the host: float32 [steps + 1], from `start` or below it down to 0.

        `spacing`, one of SPACINGS, `steps_offset` and `final`: see `diffusion/grids.py`; so is what
        depends on the `solver`. On the flow schedule "linspace" is the grid of diffusers'
        FlowMatchEulerDiscreteScheduler, even from `start` to 1/1000, or that of its multistep
        schedulers with `use_flow_sigmas`; there the ramps are of sigma, and `shift` moves all
        times towards noise.
        A ramp ends at t = 1/1000; zero terminal SNR counts as sigma/alpha = 4096, as in diffusers.

        Raises ValueError for steps below 1, or more than the spacing has, an unknown spacing or
        final, a start outside (0, 1], and what the schedule has no meaning for.
        """
        one_of("spacing", spacing, SPACINGS)
        one_of("final", final, FINALS)
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"steps is {steps!r}; a whole number from 1 is wanted")
        if not (is_number(start) and 0 < start <= 1):
            raise ValueError(f"start is {start!r}; a number above 0, at most 1, is wanted")
        if not is_number(shift) or shift <= 0:
            raise ValueError(f"shift is {shift!r}; a number above 0 is wanted")
        if isinstance(steps_offset, bool) or not isinstance(steps_offset, (int, np.integer)):
            raise ValueError(f"steps_offset is {steps_offset!r}; a whole number is wanted")
        if steps_offset < 0 or (steps_offset and spacing != "leading"):
            raise ValueError(f"steps_offset is {steps_offset}; it is for leading spacing, from 0")
        if self.schedule == "flow":
            return self._flow_times(steps, spacing, start, solver, final, shift)
        if shift != 1.0:
            raise ValueError(f'shift is {shift}; it is for schedule "flow"')
        times = self._trained_times(steps, spacing, start, solver, steps_offset)
        if final == "sigma_min":
            times[-1] = 1.0 / TIMESTEPS
        if (np.diff(times) > 0.0).any():
            raise ValueError(f"{steps} steps of {spacing} spacing do not fit below start {start}")
        return times.astype(np.float32)

    def _flow_times(self, steps, spacing, start, solver, final, shift) -> np.ndarray:
        if spacing == "leading" or final != "zero":
            what = "leading spacing" if spacing == "leading" else f"final {final!r}"
            raise ValueError(f'{what} is for schedule "sd"; "flow" has no trained steps')
        lowest = min(1.0 / TIMESTEPS, start)
        if spacing == "linspace" and solver in MULTISTEP:
            times = np.linspace(start - lowest, 0.0, steps + 1)
        elif spacing == "linspace" or spacing in RAMPS:
            # diffusers' schedulers shift the least sigma twice
            times = np.append(np.linspace(start, shifted(lowest, shift), steps), 0.0)
        else:
            times = _even(steps, spacing, start)
        times = shifted(times, shift)
        if spacing in RAMPS:
            bottom = times[-2] if steps > 1 else shifted(lowest, shift)
            times = np.append(ramp(spacing, times[0], bottom, steps), 0.0)
            times[0] = start
        return times.astype(np.float32)

    def _trained_times(self, steps, spacing, start, solver, offset) -> np.ndarray:
        if spacing in ("leading", "linspace"):
            known = round(start * TIMESTEPS)
            wanted = trained_steps(steps, spacing, known, solver, offset)
            return np.append((wanted + 1.0) / TIMESTEPS, 0.0)
        if spacing not in RAMPS:
            return _even(steps, spacing, start)
        lowest = min(1.0 / TIMESTEPS, start)
        levels = ramp(spacing, self._ratio(start), self._ratio(lowest), steps)
        return np.concatenate([[start], self.time_of(levels)[1:], [0.0]])

    def _table(self) -> np.ndarray:
        """alpha and sigma at t = 0, 1/1000, ..., 1, float32 [2, 1001]."""
        return _schedule(self.beta_schedule, self.beta_start, self.beta_end, self.zero_terminal_snr)

    def _ratio(self, t: float) -> float:
        """sigma/alpha of Stable Diffusion's schedule, in float64 on the host."""
        alpha, sigma = (
            np.interp(t * TIMESTEPS, np.arange(TIMESTEPS + 1), column)
            for column in self._table().astype(np.float64)
        )
        return float(sigma / (max(alpha, NEARLY_NONE) if self.zero_terminal_snr else alpha))

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        """The process time at which sigma/alpha is `ratio` (0 to infinity, of any shape).

        Float64, on the host.
        """
        angle = np.arctan(np.asarray(ratio, np.float64))
        alpha, sigma = np.cos(angle), np.sin(angle)
        if self.schedule == "flow":
            return sigma / (alpha + sigma)
        alphas, sigmas = self._table().astype(np.float64)
        step = np.searchsorted(np.arctan2(sigmas, alphas), angle, side="right") - 1
        step = np.clip(step, 0, TIMESTEPS - 1)
        # between two points sigma and alpha are straight lines, so their ratio says how far
        ahead = sigma * alphas[step] - alpha * sigmas[step]
        slope = alpha * (sigmas[step + 1] - sigmas[step])
        slope -= sigma * (alphas[step + 1] - alphas[step])
        return (step + np.clip(ahead / slope, 0.0, 1.0)) / TIMESTEPS


def _even(steps: int, spacing: str, start: float) -> np.ndarray:
    """The grids "uniform" and "trailing", float64."""
    times = np.linspace(start, 0.0, steps + 1)
    if spacing == "trailing":
        if steps > TIMESTEPS:
            raise ValueError(f"steps is {steps}; trailing spacing has {TIMESTEPS} at most")
        times = np.round(times * TIMESTEPS) / TIMESTEPS
    return times


@functools.cache
def _schedule(betas: str, start: float, end: float, zero_terminal_snr: bool) -> np.ndarray:
    """alpha and sigma of betas by that name, at t = 0, 1/1000, ..., 1, float32 [2, 1001]."""
    if betas == "squaredcos_cap_v2":
        whole = np.cos((np.linspace(0.0, 1.0, TIMESTEPS + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - whole[1:] / whole[:-1], 0.999)
    elif betas == "linear":
        betas = np.linspace(start, end, TIMESTEPS)
    else:
        betas = np.linspace(start**0.5, end**0.5, TIMESTEPS) ** 2
    alphas = np.sqrt(np.cumprod(1.0 - betas))
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    alphas = np.concatenate([[1.0], alphas])
    return np.stack([alphas, np.sqrt(1.0 - alphas**2)]).astype(np.float32)


def is_number(value) -> bool:
    """A finite real number, and no bool."""
    return (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, (bool, np.bool_))
        and math.isfinite(value)
    )


def one_of(what: str, value, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, naming what is allowed and likely meant, unless `value` is allowed."""
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"{what} {value!r} is unknown{hint}; allowed: {', '.join(allowed)}")
