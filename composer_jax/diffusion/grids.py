"""Grids: which steps of its schedule a process is sampled at.

A schedule of T trained steps numbers them 0 (nearly clean) to T - 1; step i is at process time
(i + 1) / T, and time 0 is the clean image. For N solver steps the spacings, under diffusers' names
(arXiv 2305.08891, table 2), are

    uniform      even process times from 1 to 0, between the trained steps
    trailing     uniform, rounded to trained steps: T - 1 is the first
    leading      multiples of T // N, plus `steps_offset`; the last of them is the offset itself
    linspace     even steps from T - 1 to 0
    karras       even in (sigma/alpha)^(1/7), from the first to the last (arXiv 2206.00364, eq. 5)
    exponential  even in log(sigma/alpha)
    beta         sigma/alpha by quantiles of the beta distribution (arXiv 2407.12173)

The multistep solvers divide by N + 1 in "leading" and "linspace", as diffusers' schedulers do.
After the last of these steps sampling ends at `final`: "zero" noise, or "sigma_min", step 0's.
"""

from __future__ import annotations

import numpy as np

SPACINGS = ("uniform", "trailing", "leading", "linspace", "karras", "exponential", "beta")
RAMPS = ("karras", "exponential", "beta")  # those that are made of levels of noise
FINALS = ("zero", "sigma_min")
MULTISTEP = ("dpmpp2m", "unipc")  # solvers whose peers have steps of their own
RHO = 7.0  # of the "karras" grid
SHAPE = 0.6  # both parameters of the "beta" grid's distribution


def trained_steps(count: int, spacing: str, trained: int, solver: str, offset: int) -> np.ndarray:
    """The `count` steps that "leading" or "linspace" evaluates, of `trained` ones; float64.

    Falling. Raises ValueError where so many steps do not fit.
    """
    multistep = solver in MULTISTEP
    parts = count + multistep
    if spacing == "linspace":
        if parts < 2:
            raise ValueError(
                f"steps is {count}; linspace spacing of {solver} has 2 at least (from the "
                "schedule's last step to its first)"
            )
        steps = np.linspace(0.0, trained - 1.0, parts)
        if solver not in ("euler", "heun"):  # these alone go by steps that are no whole numbers
            steps = steps.round()
    else:
        if parts > trained:
            raise ValueError(f"steps is {count}; leading spacing has {trained - multistep} at most")
        steps = np.arange(parts) * float(trained // parts) + offset
        if steps[-1] > trained - 1:
            raise ValueError(
                f"steps_offset is {offset}; with {count} steps the first would be {steps[-1]:.0f}, "
                f"beyond the schedule's last, {trained - 1}"
            )
    return steps[:0:-1] if multistep else steps[::-1]


def ramp(spacing: str, top: float, bottom: float, count: int) -> np.ndarray:
    """`count` levels of noise from `top` to `bottom`, spaced as one of RAMPS; float64."""
    if spacing == "karras":
        return np.linspace(top ** (1 / RHO), bottom ** (1 / RHO), count) ** RHO
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(top), np.log(bottom), count))
    from scipy.stats import beta

    return bottom + beta.ppf(1.0 - np.linspace(0.0, 1.0, count), SHAPE, SHAPE) * (top - bottom)


def shifted(times: np.ndarray, shift: float) -> np.ndarray:
    """Times of the flow schedule moved towards noise (above 1; arXiv 2403.03206, eq. 23)."""
    return shift * times / (1.0 + (shift - 1.0) * times)
