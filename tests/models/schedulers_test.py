"""Scheduler configs of diffusers: published ones, every field, and what is refused by name."""

import json
import re

import numpy as np
import pytest

from composer_jax.diffusion.process import Process
from composer_jax.models.schedulers import (
    PEERS,
    described,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
    trained_for,
    with_prediction,
)
from composer_jax.sampling.options import Options

pytestmark = pytest.mark.fast

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BASE = {**SD, "num_train_timesteps": 1000, "trained_betas": None}
# what publishers of Stable Diffusion ship, with the fields that are left of other classes
OLD = {**BASE, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
       "steps_offset": 1}  # fmt: skip
EPS = {"prediction": "eps", "schedule": "sd", "zero_terminal_snr": False, **SD}
LEADING = {"spacing": "leading", "steps_offset": 1}
EULER = "EulerDiscreteScheduler"
PUBLISHED = {
    "Stable Diffusion 1.4, 1.5, 2.1 base": (
        {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **OLD},
        EPS, {"solver": "plms", **LEADING, "final": "sigma_min"}),
    "2.1": (
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **OLD},
        EPS | {"prediction": "v"}, {"solver": "ddim", **LEADING, "final": "sigma_min"}),
    "2.1, zero terminal SNR": (
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **OLD,
         "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "set_alpha_to_one": True},
        EPS | {"prediction": "v", "zero_terminal_snr": True},
        {"solver": "ddim", "spacing": "trailing", "final": "zero"}),
    "turbo": (
        {"_class_name": "EulerAncestralDiscreteScheduler", **OLD, "prediction_type": "epsilon",
         "sample_max_value": 1.0, "timestep_spacing": "trailing", "interpolation_type": "linear"},
        EPS, {"solver": "ddim", "eta": 1.0, "spacing": "trailing", "final": "zero"}),
    "DPM-Solver++ 2M Karras": (
        {"_class_name": "DPMSolverMultistepScheduler", **OLD, "use_karras_sigmas": True,
         "algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True,
         "lambda_min_clipped": -float("inf"), "timestep_spacing": "leading"},
        EPS, {"solver": "dpmpp2m", "spacing": "karras", "final": "zero"}),
    "UniPC": (
        {"_class_name": "UniPCMultistepScheduler", **OLD, "timestep_spacing": "linspace",
         "disable_corrector": [], "solver_type": "bh2", "predict_x0": True},
        EPS, {"solver": "unipc", "spacing": "linspace", "final": "zero"}),
    "Euler": (
        {"_class_name": "EulerDiscreteScheduler", **OLD, "timestep_spacing": "leading"},
        EPS, {"solver": "euler", **LEADING, "final": "zero"}),
    "Heun": (
        {"_class_name": "HeunDiscreteScheduler", **OLD},
        EPS, {"solver": "heun", "spacing": "linspace", "final": "zero"}),
    "DDPM": (
        {"_class_name": "DDPMScheduler", **OLD, "variance_type": "fixed_small"},
        EPS, {"solver": "ddim", "eta": 1.0, **LEADING, "final": "zero"}),
    "flow matching": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
         "shift": 3.0, "use_dynamic_shifting": False, "base_shift": 0.5},
        {"prediction": "flow", "schedule": "flow"},
        {"solver": "euler", "spacing": "linspace", "final": "zero", "shift": 3.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    values, process, sampler = PUBLISHED[name]
    assert scheduler_from_diffusers(values) == (process, sampler)
    assert scheduler_from_diffusers(json.loads(json.dumps(values))) == (process, sampler)
    options = Options().but(**sampler)  # they are options, and there is a grid of them
    grid = {key: value for key, value in sampler.items() if key != "eta"}
    times = Process.from_dict(process).times(options.steps, **grid)
    assert times.shape == (options.steps + 1,) and (np.diff(times) <= 0).all()
    written = scheduler_to_diffusers(process, sampler)
    assert scheduler_from_diffusers(written) == (process, sampler)
    kept = {
        key: value for key, value in values.items() if key in PEERS[values["_class_name"]].fields
    }
    if sampler.get("spacing") != "leading":  # nowhere else does it act
        kept.pop("steps_offset", None)
    if name not in ("DDPM", "DPM-Solver++ 2M Karras"):  # the same as another class, or grid
        assert all(written[key] == value for key, value in kept.items())
    assert described(process, sampler).startswith(f"predicts {process['prediction']}")


@pytest.mark.parametrize(
    "values, acts",
    [
        ({"steps_offset": 1}, {"steps_offset": 1}),
        ({"timestep_spacing": "trailing"}, {"spacing": "trailing"}),
        ({"set_alpha_to_one": False}, {"final": "sigma_min"}),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
         {"zero_terminal_snr": True, "prediction": "v"}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "squaredcos_cap_v2"}),
        ({"beta_start": 0.001, "beta_end": 0.03}, {"beta_start": 0.001, "beta_end": 0.03}),
        ({"beta_schedule": "linear"}, {"beta_schedule": "linear"}),
        ({"_class_name": EULER, "use_karras_sigmas": True}, {"spacing": "karras"}),
        ({"_class_name": EULER, "use_beta_sigmas": True}, {"spacing": "beta"}),
        ({"_class_name": EULER, "final_sigmas_type": "sigma_min"},
         {"final": "sigma_min", "spacing": "linspace"}),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_exponential_sigmas": True},
         {"spacing": "exponential"}),
        ({"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True}, {"final": "zero"}),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0,
          "prediction_type": "flow_prediction"}, {"schedule": "flow", "shift": 5.0}),
    ],
)  # fmt: skip
def test_fields_act(values, acts):
    values = {"_class_name": "DDIMScheduler", **SD, "clip_sample": False, **values}
    process, sampler = scheduler_from_diffusers(values)
    assert acts.items() <= (process | sampler).items()
    assert scheduler_from_diffusers(scheduler_to_diffusers(process, sampler)) == (process, sampler)


def test_defaults_are_those_of_the_class():
    process, sampler = scheduler_from_diffusers(
        {"_class_name": "DDIMScheduler", "clip_sample": False}
    )
    assert (process["beta_schedule"], process["beta_start"], process["beta_end"]) == (
        "linear", 0.0001, 0.02)  # fmt: skip
    assert sampler == {"solver": "ddim", "spacing": "leading", "steps_offset": 0, "final": "zero"}
    assert scheduler_from_diffusers({"_class_name": "EulerDiscreteScheduler"})[1]["spacing"] == (
        "linspace"
    )


@pytest.mark.parametrize(
    "values, says",
    [
        ({"_class_name": "LCMScheduler"}, "scheduler class 'LCMScheduler' is unknown"),
        ({"_class_name": "EDMEulerScheduler"}, "scheduler class 'EDMEulerScheduler' is unknown"),
        ({"_class_name": "FlowMatchEulerScheduler"}, "did you mean 'FlowMatchEulerDiscreteSched"),
        ({"_class_name": None}, "scheduler class None is unknown"),
        ({"clip_sample": True}, "DDIMScheduler: clip_sample is True; only False"),
        ({"thresholding": True}, "DDIMScheduler: thresholding is True"),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500; only 1000"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas is \[0.1, 0.2\]"),
        ({"timestep_spacing": "trailling"}, "timestep_spacing is 'trailling'.*'trailing'"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'; allowed: epsilon, v_pred"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is unknown"),
        ({"beta_start": "0.1"}, "beta_start is '0.1'"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start is 0.5 and beta_end 0.1"),
        ({"steps_offset": 1.5}, "steps_offset is 1.5; a whole number"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no'; true or false"),
        ({"rescale_betas_zero_snr": True}, "eps.*cannot start from pure noise"),
        ({"steps_ofset": 1}, "DDIMScheduler: steps_ofset is 1, a field that no known scheduler"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "steps is False; only"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps is False by default; only True"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True,
          "timestep_spacing": "leading"}, "use_karras_sigmas over timestep_spacing 'leading'"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True,
          "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas exclude each other"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "'continuous'"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0}, "sigma_max is 700.0"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "one"}, "final 'one'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
         "algorithm_type is 'sde-dpmsolver"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order is 3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "is -5.1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min",
          "euler_at_final": True}, "euler_at_final is True; with final_sigmas_type 'sigma_min'"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "only True"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, r"is \[0\]; only"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "'epsilon'; with"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
         "use_dynamic_shifting is True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift is 0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "is 0.1"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(values, says):
    values = {"_class_name": "DDIMScheduler", **SD, "clip_sample": False, **values}
    if values["_class_name"] != "DDIMScheduler":
        del values["clip_sample"]
    with pytest.raises(ValueError, match=says) as error:
        scheduler_from_diffusers(values)
    message = str(error.value)
    assert "\n" not in message
    assert re.search(rf"class {values['_class_name']!r}|^{values['_class_name']}: ", message)


@pytest.mark.parametrize(
    "process, sampler, says",
    [
        ({"prediction": "v", "schedule": "flow"}, {}, "steps by v on the flow schedule"),
        ({"prediction": "flow", "schedule": "sd"}, {}, "steps by flow on Stable Diffusion's"),
        (EPS, {"solver": "heun", "final": "sigma_min"}, "HeunDiscreteScheduler of diffusers has"),
        (EPS, {"solver": "plms", "spacing": "karras"}, "PNDMScheduler of diffusers has no use_k"),
        (EPS | {"prediction": "v", "zero_terminal_snr": True}, {"solver": "heun"},
         "HeunDiscreteScheduler of diffusers has no rescale_betas_zero_snr"),
    ],
)  # fmt: skip
def test_what_diffusers_cannot_step_by_is_said(process, sampler, says):
    with pytest.raises(ValueError, match=says):
        scheduler_to_diffusers(process, sampler)


def test_a_composers_sampler_goes_to_the_class_of_the_same_step():
    made = {
        (process["prediction"], solver): scheduler_to_diffusers(process, {"solver": solver})
        for process in (EPS, {"prediction": "flow", "schedule": "flow"})
        for solver in ("ddim", "euler", "heun", "dpmpp2m", "unipc")
    }
    assert {key: values["_class_name"] for key, values in made.items()} == {
        ("eps", "ddim"): "DDIMScheduler",
        ("eps", "euler"): "EulerDiscreteScheduler",
        ("eps", "heun"): "HeunDiscreteScheduler",
        ("eps", "dpmpp2m"): "DPMSolverMultistepScheduler",
        ("eps", "unipc"): "UniPCMultistepScheduler",
        ("flow", "ddim"): "FlowMatchEulerDiscreteScheduler",
        ("flow", "euler"): "FlowMatchEulerDiscreteScheduler",
        ("flow", "heun"): "FlowMatchHeunDiscreteScheduler",
        ("flow", "dpmpp2m"): "DPMSolverMultistepScheduler",
        ("flow", "unipc"): "UniPCMultistepScheduler",
    }
    assert made["flow", "unipc"]["use_flow_sigmas"] and not made["eps", "unipc"]["use_flow_sigmas"]
    assert made["eps", "dpmpp2m"]["timestep_spacing"] == "trailing"  # the nearest to uniform


def test_another_prediction_keeps_the_betas():
    other = EPS | {"beta_end": 0.02, "zero_terminal_snr": True, "prediction": "v"}
    assert with_prediction(EPS, "v") == EPS | {"prediction": "v"}
    assert with_prediction(other, "v") == other
    assert with_prediction(other, "eps")["zero_terminal_snr"] is False
    assert with_prediction(other, "eps")["beta_end"] == 0.02
    assert with_prediction(EPS, "flow") == {"prediction": "flow", "schedule": "flow"}
    assert with_prediction({"prediction": "flow", "schedule": "flow"}, "v")["schedule"] == "sd"
    lcm = {"_class_name": "LCMScheduler", "beta_end": 0.02, "prediction_type": "v_prediction"}
    assert trained_for(lcm) == EPS | {"prediction": "v", "beta_end": 0.02}
