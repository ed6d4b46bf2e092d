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

PREDICTIONS = ("flow", "eps", "v")
SCHEDULES = ("flow", "sd")
DENSITIES = ("logit-normal", "uniform")
SPACINGS = ("uniform", "trailing", "karras")
RHO = 7.0  # of the "karras" grid
TIMESTEPS = 1000  # of Stable Diffusion's schedule
LOCATION = 10.0  # the most that training times may be shifted: by then all are noise, or none
NEARLY_NONE = 2.0**-12  # the alpha that sigma/alpha is taken at where alpha is 0, diffusers' too


@dataclass(frozen=True)
class Process:
    """Schedule and prediction; hashable, JSON both ways.

    `prediction`: "flow" (eps - x0; arXiv 2209.03003), "eps" (arXiv 2006.11239) or "v"
    (alpha eps - sigma x0; arXiv 2202.00512). `schedule`: "flow" (alpha = 1 - t, sigma = t) or "sd"
    (Stable Diffusion's 1000 steps, t = (i + 1) / 1000 being step i). `zero_terminal_snr`: rescales
    "sd" so that alpha(1) = 0 (arXiv 2305.08891, algorithm 1). `min_snr`: gamma of min-SNR loss
    weights (arXiv 2303.09556), None for none. `density`: how the flow schedule's training times
    are drawn, "logit-normal" (arXiv 2403.03206, eq. 19) or "uniform"; `location` is added to their
    logits (above 0: nearer to noise; of uniform times, eq. 23 there with a shift of e^location).

    Raises ValueError for anything else, and for "eps" where alpha(1) = 0: there the noise says
    nothing about x0.
    """

    prediction: str = "flow"
    schedule: str = "flow"
    zero_terminal_snr: bool = False
    min_snr: float | None = None
    density: str = "logit-normal"
    location: float = 0.0

    def __post_init__(self):
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("density", self.density, DENSITIES)
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
        table, part = jnp.asarray(_sd_schedule(self.zero_terminal_snr)), position - step
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

    def times(self, steps: int, spacing: str = "uniform", start: float = 1.0) -> np.ndarray:
        """A solver's grid on the host: float32 [steps + 1], from `start` down to 0.

        "uniform" is even. "trailing" is too, rounded to the 1000 steps that Stable Diffusion was
        trained at (arXiv 2305.08891, section 3.3; diffusers' `timestep_spacing="trailing"`).
        "karras" (arXiv 2206.00364, eq. 5) is dense near the image: even in sigma/alpha to the power
        of 1/7, or in sigma on the flow schedule, from `start` to t = 1/1000, then 0; as diffusers
        has it over the whole schedule, zero terminal SNR being sigma/alpha = 4096. Raises
        ValueError for steps below 1 (or above 1000, if trailing), an unknown spacing, and a start
        outside (0, 1].
        """
        one_of("spacing", spacing, SPACINGS)
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"steps is {steps!r}; a whole number from 1 is wanted")
        if not (is_number(start) and 0 < start <= 1):
            raise ValueError(f"start is {start!r}; a number above 0, at most 1, is wanted")
        if spacing == "karras":
            return self._karras_times(steps, start)
        times = np.linspace(start, 0.0, steps + 1)
        if spacing == "trailing":
            if steps > TIMESTEPS:
                raise ValueError(f"steps is {steps}; trailing spacing has {TIMESTEPS} at most")
            times = np.round(times * TIMESTEPS) / TIMESTEPS
        return times.astype(np.float32)

    def _karras_times(self, steps: int, start: float) -> np.ndarray:
        lowest = min(1.0 / TIMESTEPS, start)
        top, bottom = (t if self.schedule == "flow" else self._ratio(t) for t in (start, lowest))
        ramp = np.linspace(top ** (1 / RHO), bottom ** (1 / RHO), steps) ** RHO
        times = ramp if self.schedule == "flow" else self.time_of(ramp)
        return np.concatenate([[start], times[1:], [0.0]]).astype(np.float32)

    def _ratio(self, t: float) -> float:
        """sigma/alpha of Stable Diffusion's schedule, in float64 on the host."""
        alpha, sigma = (
            np.interp(t * TIMESTEPS, np.arange(TIMESTEPS + 1), column)
            for column in _sd_schedule(self.zero_terminal_snr).astype(np.float64)
        )
        return float(sigma / max(alpha, NEARLY_NONE))

    def time_of(self, ratio: np.ndarray) -> np.ndarray:
        """The process time at which sigma/alpha is `ratio` (0 to infinity, of any shape).

        Float64, on the host.
        """
        angle = np.arctan(np.asarray(ratio, np.float64))
        alpha, sigma = np.cos(angle), np.sin(angle)
        if self.schedule == "flow":
            return sigma / (alpha + sigma)
        alphas, sigmas = _sd_schedule(self.zero_terminal_snr).astype(np.float64)
        step = np.searchsorted(np.arctan2(sigmas, alphas), angle, side="right") - 1
        step = np.clip(step, 0, TIMESTEPS - 1)
        # between two points sigma and alpha are straight lines, so their ratio says how far
        ahead = sigma * alphas[step] - alpha * sigmas[step]
        slope = alpha * (sigmas[step + 1] - sigmas[step])
        slope -= sigma * (alphas[step + 1] - alphas[step])
        return (step + np.clip(ahead / slope, 0.0, 1.0)) / TIMESTEPS


@functools.cache
def _sd_schedule(zero_terminal_snr: bool) -> np.ndarray:
    """alpha and sigma of Stable Diffusion at t = 0, 1/1000, ..., 1, float32 [2, 1001].

    Its betas are "scaled linear": the squares of even steps between their roots.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS) ** 2
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
