"""Inversion: back to the noise, and from the noise back to the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.diffusion import Process, evaluation_times, inversion_times, invert, sample
from composer_jax.diffusion.inversion import SOLVER, SOLVERS, WAY, WAYS

FLOW = Process("flow", "flow")
SD = Process("eps", "sd")
ZERO = Process("v", "sd", zero_terminal_snr=True)
EVERY = [(solver, way) for way, solvers in WAYS.items() for solver in solvers]


def network(x, t, index):
    """Nonlinear, and no solver's own."""
    return jnp.tanh(1.5 * x * (0.3 + t)) + 0.4 * jnp.sin(7.0 * t) * jnp.cos(2.0 * x)


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 4, 4, 3)).astype(np.float32)


def round_trip(process, solver, way, steps=50, **options):
    """PSNR in dB of x0 -> x_T -> x0."""
    x0, times = images(), process.times(steps)

    @jax.jit
    def both(x0):
        x_T = invert(network, x0, times, process, solver, way, **options)
        return sample(network, x_T, times, process, solver)

    error = np.mean((np.asarray(both(x0)) - x0) ** 2)
    return 10 * np.log10(np.ptp(x0) ** 2 / error)


@pytest.mark.parametrize("process", [FLOW, SD, ZERO])
def test_the_default_is_the_best_way_back(process):
    found = {(solver, way): round_trip(process, solver, way) for solver, way in EVERY}
    for (solver, way), psnr in found.items():
        print(f"{process.prediction:5} {solver:6} {way:12} {psnr:6.1f} dB")
    best = max(found.values())
    assert found[SOLVER, WAY] > best - 1.0 and best > 80.0
    for solver in SOLVERS:
        assert found[solver, "fixed_point"] > found[solver, "plain"] + 25.0


def test_more_iterations_come_closer():
    found = [round_trip(FLOW, "ddim", "fixed_point", steps=20, iterations=n) for n in (1, 2, 4)]
    assert found[0] + 8 < found[1] < found[2] - 8


@pytest.mark.parametrize("solver, way", EVERY)
@pytest.mark.parametrize("process", [FLOW, ZERO])
def test_it_goes_to_the_noise_of_the_ode(process, solver, way):
    """With many steps every way ends where the exact solution does, that of a Gaussian."""
    mean, std = 0.8, 0.6

    def gaussian(x, t, index):
        alpha, sigma = process.alpha_sigma(t)
        pull = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return process.target(mean + alpha * std**2 * pull, sigma * pull, t)

    x0 = mean + std * images()
    x_T = invert(gaussian, x0, process.times(100), process, solver, way)
    np.testing.assert_allclose(x_T, (x0 - mean) / std, atol=0.08)


@pytest.mark.parametrize("solver, way", EVERY)
def test_evaluations_and_their_times(solver, way):
    times, seen = FLOW.times(4), []

    def watched(x, t, index):
        jax.debug.callback(lambda i, t: seen.append((int(i), float(t))), index, t)
        return x

    invert(watched, images(), times, FLOW, solver, way)
    jax.effects_barrier()
    at = inversion_times(times, solver, way)
    assert {i for i, _ in seen} == set(range(len(at)))
    for i, t in seen:
        assert abs(t - at[i]) < 1e-6
    if way == "fixed_point":  # so that one plan serves both directions
        np.testing.assert_array_equal(at, evaluation_times(times, solver))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"solver": "dpmpp2m"}, "allowed: ddim, euler, heun"),
        ({"iterations": 0}, "a whole number from 1"),
        ({"way": "fixed"}, "did you mean 'fixed_point'"),
    ],
)
def test_wrong_calls(options, says):
    with pytest.raises(ValueError, match=says):
        invert(network, images(), FLOW.times(2), FLOW, **options)
