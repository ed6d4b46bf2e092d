"""Solvers: equal to formulas written down again in float64, of their order, sound at both ends."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.diffusion import (
    SOLVERS,
    Process,
    evaluation_times,
    sample,
    solver_evaluations,
)

FLOW = Process("flow", "flow")
SD = Process("eps", "sd")
ZERO = Process("v", "sd", zero_terminal_snr=True)
ALL = [FLOW, SD, ZERO, Process("flow", "sd")]
MEAN, STD = 0.8, 0.6  # of the Gaussian that is sampled in the analytic problem


def noise(shape=(2, 4, 4, 3), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gaussian(process):
    """The perfect network for data N(MEAN, STD^2)."""

    def evaluate(x, t, index):
        alpha, sigma = process.alpha(t), process.sigma(t)
        pull = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return process.target(MEAN + alpha * STD**2 * pull, sigma * pull, t)

    return evaluate


def spread(process, t):
    """Mean and standard deviation of x_t, in float64 of the process' own alpha and sigma."""
    alpha, sigma = (np.asarray(f(t), np.float64) for f in (process.alpha, process.sigma))
    return alpha * MEAN, np.sqrt((alpha * STD) ** 2 + sigma**2)


def exact(process, x, start, end):
    """The probability-flow ODE of a Gaussian keeps x's place in units of standard deviations."""
    (mean, std), (mean_end, std_end) = spread(process, start), spread(process, end)
    return mean_end + std_end * (x - mean) / std


@functools.partial(jax.jit, static_argnames=("process", "solver"))
def solve(x, times, process, solver):
    return sample(gaussian(process), x, times, process, solver)


# A fixed model function, in numpy and in JAX alike, that no solver is exact for.


def model(x, t, xp):
    return xp.tanh(x * (0.3 + t)) + 0.2 * xp.sin(5.0 * t)


def fixed(x, t, index):
    return model(x, t, jnp)


def reference_x0_eps(process, output, x, a, s):
    if process.prediction == "eps":
        return (x - s * output) / a, output
    if process.prediction == "v":
        return a * x - s * output, s * x + a * output
    return x - s * output, x + a * output


def sd_points(process):
    alphas = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if process.zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return np.concatenate([[1.0], alphas])


def reference_grid(process, steps, solver="ddim"):
    """t, alpha, sigma in float64 at SD's whole steps or on the flow schedule."""
    t = 1 - np.arange(steps + 1) / steps
    if process.schedule == "flow":
        return t, 1 - t, t
    a = sd_points(process)[np.round(1000 * t).astype(int)]
    if solver not in ("ddim", "plms"):  # diffusers': alphas_cumprod[-1] = 2**-24
        a = np.maximum(a, 2.0**-12)
    return t, a, np.sqrt(1 - a**2)


def reference_unipc(look, x, x0, a, s, i, past):
    """One evaluation of UniPC-2 with B(h) = e^h - 1, its linear systems solved as such."""
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(s)

    def solve(start, stop, x, m, others):
        # arXiv 2302.04867, eqs. 5 to 9 for data prediction: others are (lambda, x0)
        h = lam[stop] - lam[start]
        r = np.array([(at - lam[start]) / h for at, _ in others])
        D = [(m_j - m) / r_j for r_j, (_, m_j) in zip(r, others, strict=True)]
        B, g, b = np.expm1(-h), [np.expm1(-h) / -h - 1], []
        for n in range(1, len(others) + 1):
            b.append(g[-1] * math.factorial(n) / B)
            g.append(g[-1] / -h - 1 / math.factorial(n + 1))
        if len(others) == 1:
            weights = [0.5]
        else:
            R = np.stack([r**n for n in range(len(others))])
            weights = np.linalg.solve(R, b)
        change = sum(w * d for w, d in zip(weights, D, strict=True))
        return s[stop] / s[start] * x - a[stop] * (B * m + B * change)

    finite = [j for j in range(i) if np.isfinite(lam[j])]
    if i:  # correct the step from i - 1, whose own order was 2 if it had a finite step before it
        x_old, x0s = past
        older = [(lam[i - 2], x0s[-2])] if len(x0s) > 1 and np.isfinite(lam[i - 2]) else []
        if np.isfinite(lam[i - 1]):
            x = solve(i - 1, i, x_old, x0s[-1], [*older, (lam[i], x0)])
        else:  # from pure noise e^-h is 0
            x = s[i] / s[i - 1] * x_old + a[i] * (x0s[-1] + x0) / 2
    else:
        x0s = []
    x0s = [*x0s, x0]
    if s[i + 1] == 0 or not np.isfinite(lam[i]):
        return s[i + 1] / s[i] * x + (a[i + 1] - a[i] * s[i + 1] / s[i]) * x0, (x, x0s)
    older = [(lam[i - 1], x0s[-2])] if finite and finite[-1] == i - 1 else []
    if older:
        return solve(i, i + 1, x, x0, older), (x, x0s)
    return s[i + 1] / s[i] * x - a[i + 1] * np.expm1(lam[i] - lam[i + 1]) * x0, (x, x0s)


def reference_plms(process, x, t, a, s):
    """PNDMScheduler's pseudo linear multistep, as its paper's table 1 has it."""
    seen = []

    def step(x, i, *outputs):
        combined = sum(weight * output for weight, output in outputs)
        x0, eps = reference_x0_eps(process, combined, x, a[i], s[i])
        return a[i + 1] * x0 + s[i + 1] * eps

    for i in range(len(t) - 1):
        seen.append(model(x, t[i], np))
        if i == 0:
            guess = step(x, 0, (1, seen[0]))
            if len(t) > 2:
                guess = step(x, 0, (1 / 2, seen[0]), (1 / 2, model(guess, t[1], np)))
            x = guess
        else:
            weights = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12)}.get(
                i, (55 / 24, -59 / 24, 37 / 24, -9 / 24)
            )
            x = step(x, i, *zip(weights, seen[::-1], strict=False))
    return x


def reference(solver, process, x, steps):
    """Each solver as its paper or diffusers writes it, in float64."""
    x = x.astype(np.float64)
    t, a, s = reference_grid(process, steps, solver)
    if solver == "plms":
        return reference_plms(process, x, t, a, s)

    def look(x, i):
        return reference_x0_eps(process, model(x, t[i], np), x, a[i], s[i])

    before = None
    for i in range(steps):
        x0, eps = look(x, i)
        if solver == "ddim":
            x = a[i + 1] * x0 + s[i + 1] * eps
        elif process.schedule == "flow" and solver not in ("dpmpp2m", "unipc"):
            # FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
            d, dt = eps - x0, t[i + 1] - t[i]
            if solver == "heun" and i + 1 < steps:
                x0, eps = look(x + dt * d, i + 1)
                d = (d + eps - x0) / 2
            x = x + dt * d
        elif solver in ("euler", "heun"):
            # EulerDiscreteScheduler, HeunDiscreteScheduler: x / alpha over sigma / alpha
            ratio, ratio_next = s[i] / a[i], s[i + 1] / a[i + 1]
            d, dt = eps, ratio_next - ratio
            if solver == "heun" and i + 1 < steps:
                d = (d + look(a[i + 1] * (x / a[i] + dt * d), i + 1)[1]) / 2
            x = a[i + 1] * (x / a[i] + dt * d)
        elif solver == "unipc":
            x, before = reference_unipc(look, x, x0, a, s, i, before)
        else:  # k-diffusion's sample_dpmpp_2m, in alpha, sigma
            with np.errstate(divide="ignore"):
                lam = np.log(a) - np.log(s)
            h, denoised = lam[i + 1] - lam[i], x0
            if before is not None and s[i + 1] > 0:
                r = (lam[i] - lam[i - 1]) / h
                denoised = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
            x = s[i + 1] / s[i] * x - a[i + 1] * np.expm1(-h) * denoised
            before = x0
    return x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", [FLOW, SD])
def test_equal_to_the_formulas(solver, process):
    x, steps = noise(), 8
    got = sample(fixed, x, process.times(steps), process, solver)
    want = reference(solver, process, x, steps)
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp2m", "unipc", "plms"])
def test_equal_to_the_formulas_at_zero_terminal_snr(solver):
    x = noise()
    got = sample(fixed, x, ZERO.times(10), ZERO, solver)
    want = reference(solver, ZERO, x, 10)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


def test_ddims_noise_is_the_papers():
    x, eta, steps = noise(), 0.7, 10
    key = jax.random.key(3)
    got = sample(fixed, x, SD.times(steps), SD, "ddim", key=key, eta=eta)
    t, a, s = reference_grid(SD, steps)
    want = x.astype(np.float64)
    for i in range(steps):
        z = np.asarray(jax.random.normal(jax.random.fold_in(key, i), x.shape), np.float64)
        x0, eps = reference_x0_eps(SD, model(want, t[i], np), want, a[i], s[i])
        # eq. 16 of arXiv 2010.02502, its alpha being alpha^2 here
        std = eta * s[i + 1] / s[i] * np.sqrt(1 - a[i] ** 2 / a[i + 1] ** 2)
        want = a[i + 1] * x0 + np.sqrt(s[i + 1] ** 2 - std**2) * eps + std * z
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


@pytest.mark.parametrize("process", [FLOW, ZERO])
def test_ddim_with_noise_keeps_the_distribution(process):
    x = noise((20000,), seed=5)
    run = jax.jit(
        lambda x, key, eta: sample(
            gaussian(process), x, process.times(60), process, "ddim", key=key, eta=eta
        )
    )
    got = np.asarray(run(x, jax.random.key(1), 1.0))
    assert abs(got.mean() - MEAN) < 0.05 and abs(got.std() - STD) < 0.05
    assert abs(np.corrcoef(got, x)[0, 1]) < 0.6  # while without noise it is 1
    still = run(x, jax.random.key(2), 0.0)
    np.testing.assert_allclose(still, solve(x, process.times(60), process, "ddim"), atol=1e-5)


def test_an_examples_noise_is_its_own():
    keys, x = jax.random.split(jax.random.key(0), 3), noise((3, 2, 2, 1))

    def run(x, key):
        times = FLOW.times(4)
        return sample(gaussian(FLOW), x, times, FLOW, "ddim", key=key, eta=1.0)

    whole, alone = run(x, jax.random.clone(keys)), run(x[1:2], jax.random.clone(keys[1:2]))
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp2m", "unipc"])
@pytest.mark.parametrize("process", [FLOW, SD])
def test_order_of_convergence(process, solver):
    """Over a factor of 4 or 8 in steps; unipc's error on SD's schedule changes sign in between."""
    start, end, few = (1.0, 0.2, 16) if process.schedule == "flow" else (0.9, 0.2, 8)
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    errors = []
    for steps in (few, 64):
        times = np.linspace(start, end, steps + 1, dtype=np.float32)
        error = np.asarray(solve(x, times, process, solver)) - exact(process, x, start, end)
        errors.append(np.abs(error).max())
    order = {"ddim": 1, "unipc": 3}.get(solver, 2)
    assert errors[1] < {1: 1.5e-2, 2: 5e-4, 3: 1e-4}[order]
    assert np.log(errors[0] / errors[1]) / np.log(64 / few) > order - 0.3, errors


@pytest.mark.parametrize("process", ALL)
def test_sound_from_end_to_end(process):
    """From pure noise to the data; one step is the prediction of x0, but for x / 4096."""
    x = noise((1000,), seed=2)

    @jax.jit
    def run(x):
        one = [sample(fixed, x, process.times(1), process, solver) for solver in SOLVERS]
        return one, [
            sample(gaussian(process), x, process.times(50), process, solver) for solver in SOLVERS
        ]

    one, many = run(x)
    x0, _ = process.x0_eps(model(x, 1.0, jnp), x, 1.0)
    for got in one:
        np.testing.assert_allclose(got, x0, rtol=1e-4, atol=1e-3)
    for got in many:
        assert np.abs(got - exact(process, x, 1.0, 0.0)).max() < 0.1


def watched(seen):
    """A model function that notes the index and time of each evaluation."""

    def evaluate(x, t, index):
        jax.debug.callback(lambda i, t: seen.append((int(i), float(t))), index, t)
        return x

    return evaluate


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_and_their_times(solver):
    times = FLOW.times(5)

    count = solver_evaluations(solver, 5)
    at = evaluation_times(times, solver)
    assert count == {"heun": 9, "plms": 6}.get(solver, 5) and at.shape == (count,)
    seen = []
    sample(watched(seen), noise(), times, FLOW, solver)
    jax.effects_barrier()
    assert [i for i, _ in sorted(seen)] == list(range(count))
    np.testing.assert_allclose([t for _, t in sorted(seen)], at)
    if solver == "heun":
        np.testing.assert_allclose(at, [1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2], atol=1e-6)
    elif solver == "plms":
        np.testing.assert_allclose(at, [1, 0.8, 0.8, 0.6, 0.4, 0.2], atol=1e-6)
        assert solver_evaluations(solver, 1) == 1
    else:
        np.testing.assert_array_equal(at, times[:-1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_values_never_recompile_and_the_network_is_traced_once(solver):
    traced = []

    @jax.jit
    def run(x, times, gain, key, eta):
        def evaluate(x, t, index):
            traced.append(solver)
            return gain[index] * x

        options = {"key": key, "eta": eta} if solver == "ddim" else {}
        return sample(evaluate, x, times, FLOW, solver, **options)

    gain = np.ones(solver_evaluations(solver, 3), np.float32)
    for i in range(3):
        run(noise(seed=i), FLOW.times(3) * (1 - 0.1 * i), gain * i, jax.random.key(i), 0.1 * i)
    assert run._cache_size() == 1
    assert len(traced) == 1  # one network in the scan's body


def test_what_evaluations_bring_along_is_stacked():
    def evaluate(x, t, index):
        return gaussian(FLOW)(x, t, index), {"t": t, "index": index}

    x, times = noise(), FLOW.times(4)
    got, aux = sample(evaluate, x, times, FLOW, "euler", has_aux=True)
    np.testing.assert_array_equal(got, sample(gaussian(FLOW), x, times, FLOW, "euler"))
    np.testing.assert_array_equal(aux["index"], np.arange(4))
    np.testing.assert_allclose(aux["t"], times[:-1])


def test_starting_midway_is_the_same_road():
    """Image to image: a truncated grid goes on from x at its first time."""
    x, times = noise(), FLOW.times(8)
    middle = solve(x, times[:5], FLOW, "euler")
    end = solve(middle, times[4:], FLOW, "euler")
    np.testing.assert_allclose(end, solve(x, times, FLOW, "euler"), atol=1e-5)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: sample(model, noise(), FLOW.times(2), FLOW, "dpmp2m"), "did you mean 'dpmpp2m'"),
        (lambda: sample(model, noise(), FLOW.times(2), FLOW, "ddim", eta=1.0), "key"),
        (lambda: sample(model, noise(), FLOW.times(2), FLOW, "heun", eta=1.0), "ddim"),
        (lambda: sample(model, noise(), np.ones(1), FLOW), "steps at least 1"),
        (lambda: solver_evaluations("eular", 3), "did you mean 'euler'"),
    ],
)
def test_wrong_calls(call, says):
    with pytest.raises(ValueError, match=says):
        call()
