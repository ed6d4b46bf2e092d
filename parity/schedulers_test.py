"""Scheduler configs as our process and grid, against the schedulers that diffusers makes of them.

The model function takes x and the timestep that the network is told, so that timesteps, levels of
noise and steps are compared at once, over whole trajectories.
"""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from composer_jax.diffusion import Process, evaluation_times, sample
from composer_jax.models.schedulers import scheduler_from_diffusers, scheduler_to_diffusers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (4, 20, 50)
TOLERANCE = 2e-5  # relative L2 over a whole trajectory
CLASSES = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}
SPACINGS = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 0},
    "leading from 1": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
}
VARIANCE = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler")


def network(x, timestep, xp):
    return xp.tanh(x * (0.3 + timestep / 1000)) + 0.2 * xp.sin(5.0 * timestep / 1000)


def noise():
    return np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


@functools.cache
def runner(process, solver, noisy):
    def evaluate(x, t, index):
        return network(x, process.timestep(t), jnp)

    def run(x, times):
        key, eta = (jax.random.key(0), 1.0) if noisy else (None, 0.0)
        return sample(evaluate, x, times, process, solver, key=key, eta=eta)

    return jax.jit(run)


def ours(config, steps):
    """The sample, and the timesteps of its evaluations."""
    process, sampler = scheduler_from_diffusers(config)
    process, eta = Process.from_dict(process), sampler.pop("eta", 0.0)
    times = process.times(steps, **sampler)
    told = process.timestep(evaluation_times(times, sampler["solver"]))
    return np.asarray(runner(process, sampler["solver"], bool(eta))(noise(), times)), told


def theirs(config, steps, monkeypatch, name):
    """The same by diffusers, in float64 where it would round x to float32 at each step."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.from_numpy(noise()).double()
    if name in VARIANCE:  # whose x is divided by alpha; their first noise may be smaller
        x = x * (1 + scheduler.sigmas[0].double() ** 2) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        looked = x if "Flow" in name else scheduler.scale_model_input(x, t)
        output = network(looked.double(), torch.as_tensor(float(t), dtype=torch.float64), torch)
        if name == "EulerAncestralDiscreteScheduler":
            x = ancestral(scheduler, output, t, x, i)
        else:
            x = scheduler.step(output, t, x).prev_sample.double()
    if name in VARIANCE:
        x = x / (1 + scheduler.sigmas[-1].double() ** 2) ** 0.5
    return x.numpy(), np.asarray(scheduler.timesteps, np.float64)


def ancestral(scheduler, output, t, x, i):
    """One step with our noise in place of what torch would draw."""
    key = jax.random.fold_in(jax.random.key(0), i)
    drawn = torch.from_numpy(np.array(jax.random.normal(key, x.shape))).double()
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: drawn)
        return scheduler.step(output, t, x).prev_sample.double()


def compare(config, steps, monkeypatch, tolerance=TOLERANCE, atol=2e-3):
    x, told = ours(config, steps)
    wanted, timesteps = theirs(config, steps, monkeypatch, config["_class_name"])
    np.testing.assert_allclose(told, timesteps, atol=atol)
    difference = np.linalg.norm(x - wanted) / np.linalg.norm(wanted)
    assert difference < tolerance, difference


def ends(name):
    """The fields that say what noise sampling ends at, both ways where the class has one."""
    if name in ("DDIMScheduler", "PNDMScheduler"):
        return [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]
    if name == "HeunDiscreteScheduler":
        return [{}]
    return [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]


GRIDS = [
    (name, spacing, end)
    for name in CLASSES
    for spacing in SPACINGS
    for end in ends(name)
    if not (name in ("DDIMScheduler", "PNDMScheduler") and spacing == "linspace")
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name, spacing, end", GRIDS)
def test_stable_diffusions_schedule(name, spacing, end, prediction, steps, monkeypatch):
    config = {"_class_name": name, **SD, **CLASSES[name], **SPACINGS[spacing], **end}
    compare({**config, "prediction_type": prediction}, steps, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_linspace_of_classes_that_step_past_their_next_timestep(name, steps, monkeypatch):
    """Their steps are 1000 // N long whatever the spacing; ours end where the next one starts.

    Timesteps are theirs; the trajectory is that of EulerDiscreteScheduler on the same timesteps.
    """
    config = {"_class_name": name, **SD, **CLASSES[name], **SPACINGS["linspace"],
              "set_alpha_to_one": True}  # fmt: skip
    x, told = ours(config, steps)
    _, timesteps = theirs(config, steps, monkeypatch, name)
    np.testing.assert_allclose(told, timesteps, atol=2e-3)
    if name == "DDIMScheduler":
        euler = diffusers.EulerDiscreteScheduler(**SD)
        euler.set_timesteps(timesteps=list(timesteps))
        y = torch.from_numpy(noise()).double() * (1 + euler.sigmas[0].double() ** 2) ** 0.5
        for t in euler.timesteps:
            output = network(euler.scale_model_input(y, t), t.double(), torch)
            y = euler.step(output, t, y).prev_sample.double()
        assert np.linalg.norm(x - y.numpy()) / np.linalg.norm(y) < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["DDIMScheduler", *list(CLASSES)[2:3], *list(CLASSES)[4:]])
@pytest.mark.parametrize("spacing", ["trailing", "leading from 1"])
def test_zero_terminal_snr(name, spacing, steps, monkeypatch):
    config = {"_class_name": name, **SD, **CLASSES[name], **SPACINGS[spacing],
              "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}  # fmt: skip
    compare(config, steps, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_other_betas(name, betas, steps, monkeypatch):
    config = {"_class_name": name, **betas, **CLASSES[name], **SPACINGS["leading from 1"]}
    compare(config, steps, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("ramp", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_ramps(name, ramp, steps, monkeypatch):
    """Timesteps lie between trained ones, by log(sigma) there and by alpha and sigma here."""
    config = {"_class_name": name, **SD, f"use_{ramp}_sigmas": True}
    compare(config, steps, monkeypatch, 1e-4, atol=0.2)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading from 1", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_is_ddim_with_all_its_noise(spacing, prediction, steps, monkeypatch):
    config = {"_class_name": "EulerAncestralDiscreteScheduler", **SD, **SPACINGS[spacing],
              "prediction_type": prediction}  # fmt: skip
    compare(config, steps, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_exponential_sigmas": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_beta_sigmas": True},
    ],
)
def test_flow_matching(config, shift, steps, monkeypatch):
    compare({**config, "shift": shift}, steps, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", list(CLASSES)[4:])
def test_flow_by_multistep_schedulers(name, shift, steps, monkeypatch):
    """They tell the network whole timesteps; `solvers_test.py` compares what is between."""
    config = {"_class_name": name, "use_flow_sigmas": True, "flow_shift": shift,
              "prediction_type": "flow_prediction"}  # fmt: skip
    process, sampler = scheduler_from_diffusers(config)
    times = Process.from_dict(process).times(steps, **sampler)
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(times, scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize("name", [*CLASSES, "FlowMatchEulerDiscreteScheduler"])
def test_what_we_write_is_whole_for_diffusers(name):
    """No field is left to a default of a version, but two that JSON or they cannot hold."""
    config = {"_class_name": name, **CLASSES.get(name, {})}
    written = scheduler_to_diffusers(*scheduler_from_diffusers(config))
    made = getattr(diffusers, name).from_config(written)
    whole = {key for key in made.config if not key.startswith("_")}
    inert = {"dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range",
             "lower_order_final", "euler_at_final", "lambda_min_clipped", "time_shift_type",
             "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}  # fmt: skip
    assert whole - inert <= written.keys()
    assert {key: made.config[key] for key in written if key in whole} == {
        key: value for key, value in written.items() if key in whole
    }
