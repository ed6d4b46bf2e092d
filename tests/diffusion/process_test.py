"""The process: Stable Diffusion's numbers, and raw outputs there and back at every t."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_jax.diffusion import Process

ALL = [
    Process("flow", "flow"),
    Process("v", "flow"),
    Process("eps", "sd"),
    Process("v", "sd"),
    Process("flow", "sd"),
    Process("v", "sd", zero_terminal_snr=True),
    Process("flow", "sd", zero_terminal_snr=True),
]


def sd_alphas_cumprod():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def zero_terminal_alphas_cumprod():
    """Algorithm 1 of arXiv 2305.08891, from betas to betas, as printed there."""
    alphas_bar_sqrt = np.sqrt(sd_alphas_cumprod())
    first, last = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
    alphas_bar_sqrt = (alphas_bar_sqrt - last) * (first / (first - last))
    alphas_bar = alphas_bar_sqrt**2
    alphas = np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    betas = 1 - alphas
    return np.cumprod(1 - betas)


def test_stable_diffusions_schedule():
    process = Process("eps", "sd")
    steps = np.arange(1000)
    alpha, sigma = process.alpha((steps + 1) / 1000), process.sigma((steps + 1) / 1000)
    alphas_cumprod = sd_alphas_cumprod()
    # Golden: diffusers' DDIMScheduler with SD 1.5's scheduler_config.json.
    np.testing.assert_allclose(alphas_cumprod[[0, 999]], [0.99915, 0.0046602], rtol=1e-4)
    np.testing.assert_allclose(alpha, np.sqrt(alphas_cumprod), rtol=2e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - alphas_cumprod), rtol=5e-6)
    np.testing.assert_allclose(process.timestep((steps + 1) / 1000), steps, atol=1e-4)
    assert alpha.dtype == sigma.dtype == jnp.float32
    assert process.timestep(0.0) == 0.0 == Process().timestep(0.0)  # no step before the first


def test_zero_terminal_snr():
    process = Process("v", "sd", zero_terminal_snr=True)
    t = (np.arange(1000) + 1) / 1000
    np.testing.assert_allclose(
        process.alpha(t), np.sqrt(zero_terminal_alphas_cumprod()), rtol=1e-4, atol=1e-7
    )
    assert process.alpha(1.0) == 0.0 and process.sigma(1.0) == 1.0


@pytest.mark.parametrize("process", ALL)
def test_ends_and_monotony(process):
    t = np.linspace(0, 1, 3001, dtype=np.float32)
    alpha, sigma = np.asarray(process.alpha(t)), np.asarray(process.sigma(t))
    assert alpha[0] == 1 and sigma[0] == 0
    assert (np.diff(alpha) < 0).all() and (np.diff(sigma) >= 0).all()
    power = alpha + sigma if process.schedule == "flow" else alpha**2 + sigma**2
    np.testing.assert_allclose(power, 1, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    process=st.sampled_from(ALL),
    t=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32)),
    seed=st.integers(0, 2**31),
)
def test_a_true_output_gives_x0_and_eps_back(process, t, seed):
    x0, eps = np.random.default_rng(seed).normal(size=(2, 2, 3, 3, 1)).astype(np.float32)
    x_t = process.diffuse(x0, eps, t)
    got_x0, got_eps = process.x0_eps(process.target(x0, eps, t), x_t, t)
    np.testing.assert_allclose(got_x0, x0, atol=5e-5)
    np.testing.assert_allclose(got_eps, eps, atol=5e-5)


@settings(max_examples=25, deadline=None)
@given(
    process=st.sampled_from(ALL),
    t=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)),
    output=st.floats(-10, 10, width=32),
)
def test_any_output_stays_finite_and_consistent(process, t, output):
    x_t = jnp.full((1, 1, 1, 1), 0.7)
    x0, eps = process.x0_eps(jnp.full((1, 1, 1, 1), output), x_t, t)
    assert np.isfinite(x0).all() and np.isfinite(eps).all()
    np.testing.assert_allclose(process.diffuse(x0, eps, t), x_t, atol=1e-4)


def test_each_example_has_its_own_time():
    process = Process()
    x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    t = np.array([0.0, 0.25, 1.0], np.float32)[:, None, None, None]
    x_t = process.diffuse(x0, eps, t)
    np.testing.assert_allclose(x_t[0], x0[0])
    np.testing.assert_allclose(x_t[1], 0.75 * x0[1] + 0.25 * eps[1], rtol=1e-5)
    np.testing.assert_allclose(x_t[2], eps[2])
    np.testing.assert_allclose(process.target(x0, eps, t), eps - x0)


def test_training_times():
    flow = np.asarray(Process().sample_times(jax.random.key(0), (20000,)))
    assert flow.min() > 0 and flow.max() < 1
    logit = np.log(flow / (1 - flow))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    near = np.asarray(Process(location=1.0).sample_times(jax.random.key(0), (20000,)))
    np.testing.assert_allclose(np.log(near / (1 - near)), logit + 1, atol=2e-3)
    even = np.asarray(Process(density="uniform").sample_times(jax.random.key(0), (20000,)))
    assert abs(even.mean() - 0.5) < 0.01 and abs(even.std() - 12**-0.5) < 0.01
    shifted = Process(density="uniform", location=1.0)
    shifted = np.asarray(shifted.sample_times(jax.random.key(0), (20000,)))
    np.testing.assert_allclose(shifted, np.e * even / (1 + (np.e - 1) * even), rtol=1e-5)
    sd = np.asarray(Process("eps", "sd").sample_times(jax.random.key(0), (20000,)))
    steps = np.asarray(Process("eps", "sd").timestep(sd))
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert np.round(steps).min() == 0 and np.round(steps).max() == 999
    assert abs(steps.mean() - 499.5) < 6


def test_min_snr_weights():
    t = np.array([0.001, 0.1, 0.5, 1.0], np.float32)
    snr = sd_alphas_cumprod()[[0, 99, 499, 999]]
    snr = snr / (1 - snr)
    eps = Process("eps", "sd", min_snr=5.0).loss_weight(t)
    np.testing.assert_allclose(eps, np.minimum(snr, 5) / snr, rtol=1e-4)
    v = Process("v", "sd", min_snr=5.0).loss_weight(t)
    np.testing.assert_allclose(v, np.minimum(snr, 5) / (snr + 1), rtol=1e-4)
    # One weight of the error of x0, whatever is predicted: flow's x0 is x_t - t output.
    flow = Process("flow", "flow", min_snr=5.0).loss_weight(t[1:])
    t = t[1:].astype(np.float64)
    np.testing.assert_allclose(flow, np.minimum(((1 - t) / t) ** 2, 5) * t**2, rtol=1e-5)
    # of v on the flow schedule: that of the flow it implies
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    t = np.array([0.1, 0.5, 1.0], np.float32)[:, None, None, None]
    v, output = Process("v", "flow"), np.random.default_rng(1).normal(size=x0.shape)
    error = np.mean((output - v.target(x0, noise, t)) ** 2, axis=(1, 2, 3))
    found = v.x0_eps(output, v.diffuse(x0, noise, t), t)
    wanted = np.mean((found[1] - found[0] - (noise - x0)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(v.loss_weight(t[:, 0, 0, 0]) * error, wanted, rtol=1e-4)
    for process in (ALL[0], ALL[2], ALL[5]):
        np.testing.assert_array_equal(process.loss_weight(np.linspace(0, 1, 5)), np.ones(5))
        limited = Process(process.prediction, process.schedule, process.zero_terminal_snr, 5.0)
        assert np.isfinite(limited.loss_weight(np.linspace(0, 1, 5))).all()


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50, 999])
def test_time_grids(steps):
    process = Process("eps", "sd")
    uniform, trailing = process.times(steps), process.times(steps, "trailing")
    np.testing.assert_allclose(uniform, 1 - np.arange(steps + 1) / steps, atol=1e-6)
    # diffusers' timestep_spacing="trailing"
    timesteps = np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
    np.testing.assert_allclose(process.timestep(trailing[:-1]), timesteps, atol=1e-4)
    for times in (uniform, trailing):
        assert times.dtype == np.float32 and times[0] == 1 and times[-1] == 0
        assert (np.diff(times) < 0).all()


def test_json_both_ways():
    for process in [*ALL, Process("v", "sd", min_snr=5.0)]:
        assert Process.from_dict(json.loads(json.dumps(process.to_dict()))) == process
    assert Process.from_dict({}) == Process("flow", "flow")
    assert len({hash(p) for p in ALL}) == len(ALL)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"prediction": "epsilon"}, "did you mean 'eps'"),
        ({"schedule": "cosine"}, "allowed: flow, sd"),
        ({"predicton": "v"}, "did you mean 'prediction'"),
        ({"prediction": "eps", "schedule": "sd", "zero_terminal_snr": True}, "pure noise"),
        ({"prediction": "eps"}, "pure noise"),
        ({"zero_terminal_snr": True}, "sd"),
        ({"zero_terminal_snr": "yes"}, "true or false"),
        ({"density": "even"}, "allowed: logit-normal, uniform"),
        ({"location": "1"}, "location is '1'"),
        ({"location": -800.0}, "location is -800.0; a number from -10.0 to 10.0"),
        ({"location": 1.0, "schedule": "sd", "prediction": "v"}, "location is for schedule"),
        ({"min_snr": 0}, "min_snr is 0"),
        ({"min_snr": "5"}, "min_snr is '5'"),
    ],
)
def test_wrong_processes(values, says):
    with pytest.raises(ValueError, match=says) as error:
        Process.from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, says",
    [((0,), "steps is 0"), ((2.5,), "steps"), ((True,), "steps"), ((4, "trail"), "'trailing'"),
     ((1001, "trailing"), "1000 at most"), ((4, "uniform", 0.0), "start is 0.0")],
)  # fmt: skip
def test_wrong_grids(arguments, says):
    with pytest.raises(ValueError, match=says):
        Process().times(*arguments)


def test_every_combination_is_made_or_refused():
    for prediction, schedule in itertools.product(("flow", "eps", "v"), ("flow", "sd")):
        if (prediction, schedule) == ("eps", "flow"):
            continue
        assert Process(prediction, schedule).prediction == prediction


@pytest.mark.parametrize("process", [Process("flow", "flow"), Process("eps", "sd")])
def test_karras_is_even_in_the_seventh_root(process):
    for start in (1.0, 0.6):
        times = process.times(12, "karras", start)
        assert times.shape == (13,) and times.dtype == np.float32 and times[-1] == 0.0
        np.testing.assert_allclose(times[[0, -2]], [start, 0.001], rtol=1e-5)
        alpha, sigma = (np.asarray(a, np.float64) for a in process.alpha_sigma(times[:-1]))
        root = (sigma if process.schedule == "flow" else sigma / alpha) ** (1 / 7)
        np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=2e-3)


def test_karras_at_zero_terminal_snr_starts_from_4096():
    process = Process("v", "sd", zero_terminal_snr=True)
    times = process.times(5, "karras")
    assert times[0] == 1.0 and times[-1] == 0.0 and (np.diff(times) < 0).all()
    alpha, sigma = (np.asarray(a, np.float64) for a in process.alpha_sigma(times[1:-1]))
    root = np.concatenate([[4096.0], sigma / alpha]) ** (1 / 7)
    np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=2e-3)


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "karras"])
def test_a_grid_can_start_midway(spacing):
    times = Process("eps", "sd").times(8, spacing, 0.5)
    assert times[0] == 0.5 and times[-1] == 0.0 and (np.diff(times) < 0).all()


@pytest.mark.parametrize(
    "process",
    [Process("flow", "flow"), Process("eps", "sd"), Process("v", "sd", zero_terminal_snr=True)],
)
def test_the_time_of_a_ratio(process):
    t = np.linspace(0.0, 0.998, 501)
    alpha, sigma = (np.asarray(a, np.float64) for a in process.alpha_sigma(t))
    np.testing.assert_allclose(process.time_of(sigma / alpha), t, atol=2e-6)
    np.testing.assert_allclose(process.time_of([0.0, np.inf]), [0.0, 1.0], rtol=1e-15)
