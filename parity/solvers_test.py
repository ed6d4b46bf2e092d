"""Solvers against diffusers' schedulers of the same name, step by step, on one model function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from composer_jax.diffusion import Process, evaluation_times, sample

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
STEPS = (4, 7, 10, 20, 50)
MULTISTEP = {"dpmpp2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
TOLERANCE = 1e-5  # relative L2


def network(x, t, xp):
    """A model function of what both sides know exactly: x_t, and how noisy it is, t in [0, 1]."""
    return xp.tanh(x * (0.3 + t)) + 0.2 * xp.sin(5.0 * t)


def noise():
    return np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


def ours(process, times, solver, eta=0.0):
    def evaluate(x, t, index):
        alpha, sigma = process.alpha_sigma(t)
        return network(x, sigma / (alpha + sigma), jnp)

    key = jax.random.key(0) if eta else None
    run = jax.jit(lambda x, times: sample(evaluate, x, times, process, solver, key=key, eta=eta))
    return np.asarray(run(noise(), times))


def noisiness(alpha, sigma):
    """As `ours` has it: the alpha of 2^-12 that schedulers take for none is none."""
    alpha = 0.0 if alpha < 2.5e-4 else float(alpha)
    return torch.as_tensor(float(sigma) / (alpha + float(sigma)), dtype=torch.float64)


def near(found, wanted):
    wanted = wanted.numpy().astype(np.float64)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < TOLERANCE


def process_of(prediction, zero=False):
    return Process(prediction, "sd", zero_terminal_snr=zero)


@pytest.mark.parametrize("steps", STEPS[:1] + STEPS[2:])
@pytest.mark.parametrize("prediction, zero", [("eps", False), ("v", False), ("v", True)])
@pytest.mark.parametrize("eta", [0.0, 0.6, 0.99])
def test_ddim(steps, prediction, zero, eta):
    """At zero terminal SNR and eta 1 theirs is not a number: the root of -1e-8."""
    scheduler = DDIMScheduler(
        **SD,
        timestep_spacing="trailing",
        prediction_type=PREDICTIONS[prediction],
        rescale_betas_zero_snr=zero,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise()).double()
    for i, t in enumerate(scheduler.timesteps):
        alpha = scheduler.alphas_cumprod[t].double() ** 0.5
        output = network(x, noisiness(alpha, (1 - alpha**2) ** 0.5), torch)
        key = jax.random.fold_in(jax.random.key(0), i)
        drawn = torch.from_numpy(np.array(jax.random.normal(key, x.shape))).double()
        x = scheduler.step(output, t, x, eta=eta, variance_noise=drawn if eta else None).prev_sample
    process = process_of(prediction, zero)
    near(ours(process, process.times(steps, "trailing"), "ddim", eta=eta), x)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading", "karras"])
@pytest.mark.parametrize(
    "solver, make", [("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler)]
)
def test_euler_and_heun(solver, make, spacing, prediction, steps):
    """Over sigma/alpha, whose scale of x is put back; on the scheduler's own grid."""
    karras = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    options = karras if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = make(**SD, prediction_type=PREDICTIONS[prediction], **options)
    scheduler.set_timesteps(steps)
    process = process_of(prediction)
    ratios = scheduler.sigmas.double().numpy()
    x = over_alpha(scheduler)
    grid = ratios if solver == "euler" else np.append(ratios[:-1:2], 0.0)
    assert len(grid) == steps + 1
    times = process.time_of(grid).astype(np.float32)
    near(ours(process, times, solver), x)
    if spacing == "karras":  # theirs is the whole schedule's with linspace
        np.testing.assert_allclose(process.times(steps, "karras"), times, rtol=1e-4, atol=1e-6)


def over_alpha(scheduler):
    """Runs a scheduler whose sample is x / alpha."""
    ratios = scheduler.sigmas.double().numpy()
    x = torch.from_numpy(noise()).double() * (1 + ratios[0] ** 2) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        scale = (1 + ratios[i] ** 2) ** 0.5
        output = network(x / scale, noisiness(1 / scale, ratios[i] / scale), torch)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample.double()
    return x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("solver, make", [("euler", EulerDiscreteScheduler), *MULTISTEP.items()])
def test_zero_terminal_snr(solver, make, spacing, steps, monkeypatch):
    """On our own grids, from t = 1, where sigma/alpha is 4096 for either.

    In float64: in Euler's own float32 a sample of that size loses up to 3e-5 on the way down.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    karras = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    options = karras if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = make(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, **options)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # rounded, the first timesteps of a Karras grid are the same
    x = over_alpha(scheduler) if solver == "euler" else multistep(scheduler)
    process = process_of("v", zero=True)
    near(ours(process, process.times(steps, spacing), solver), x)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading", "karras"])
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep(solver, spacing, prediction, steps):
    options = {"timestep_spacing": spacing}
    if spacing == "karras":
        options = {"use_karras_sigmas": True}
    scheduler = MULTISTEP[solver](**SD, prediction_type=PREDICTIONS[prediction], **options)
    scheduler.set_timesteps(steps)
    x = multistep(scheduler)
    process = process_of(prediction)
    times = process.time_of(scheduler.sigmas.double().numpy()).astype(np.float32)
    near(ours(process, times, solver), x)
    if spacing in ("trailing", "karras"):
        np.testing.assert_allclose(process.times(steps, spacing), times, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_on_flow(solver, steps):
    scheduler = MULTISTEP[solver](use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(steps)
    x = multistep(scheduler, flow=True)
    times = scheduler.sigmas.double().numpy().astype(np.float32)
    near(ours(Process("flow", "flow"), times, solver), x)


def multistep(scheduler, flow=False):
    x = torch.from_numpy(noise()).double()
    for i, t in enumerate(scheduler.timesteps):
        ratio = float(scheduler.sigmas[i])
        alpha = 1 - ratio if flow else 1 / (1 + ratio**2) ** 0.5
        sigma = ratio if flow else ratio * alpha
        x = scheduler.step(network(x, noisiness(alpha, sigma), torch), t, x).prev_sample.double()
    return x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_flow_match_euler(steps, spacing):
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=spacing == "karras")
    if spacing == "uniform":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise()).double()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, scheduler.sigmas[i].double(), torch), t, x).prev_sample
        x = x.double()
    process = Process("flow", "flow")
    times = process.times(steps, spacing)
    np.testing.assert_allclose(times, scheduler.sigmas.numpy(), atol=1e-6)
    near(ours(process, times, "euler"), x)


@pytest.mark.parametrize("steps", STEPS)
def test_flow_match_heun(steps):
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise()).double()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, scheduler.sigmas[i].double(), torch), t, x).prev_sample
        x = x.double()
    times = np.append(scheduler.sigmas.numpy()[:-1:2], 0.0)
    assert len(evaluation_times(times, "heun")) == len(scheduler.timesteps)
    near(ours(Process("flow", "flow"), times, "heun"), x)
