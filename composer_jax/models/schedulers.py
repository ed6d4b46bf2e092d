"""Scheduler configs of diffusers, as our process and sampler, and back.

A `scheduler_config.json` says two things: what the network was trained for (betas, prediction: our
`Process`), and how its authors sample it (class, spacing, ends: our `Options`). Every field is
read: it acts, or it has the one value that our solvers keep, or it is refused by class, name and
value. Defaults of fields that a file lacks are those of diffusers 0.35.2's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from composer_jax.conditions.base import meant
from composer_jax.diffusion.grids import RAMPS, SPACINGS
from composer_jax.diffusion.process import MEANING, Process

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
FLOW_PREDICTION = "flow_prediction"
FLOW = {"prediction": "flow", "schedule": "flow"}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACED = ("leading", "linspace", "trailing")
FLAGS = {name: f"use_{name}_sigmas" for name in RAMPS}
# fields that act only beside another one that is refused
IDLE = ("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "time_shift_type",
        "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "lower_order_final",
        "euler_at_final")  # fmt: skip
# fields of other classes, which diffusers itself passes over where a config changed its class
FOREIGN = ("original_inference_steps", "timestep_scaling", "noise_sampler_seed", "sigma_data",
           "sigma_schedule", "rho", "predictor_order", "corrector_order", "tau_func")  # fmt: skip

TRAINED = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
           "prediction_type": "epsilon"}  # fmt: skip
ALWAYS = {"num_train_timesteps": (1000,), "trained_betas": (None,)}
ZERO = {"rescale_betas_zero_snr": False}
OFFSET = {"steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", **OFFSET}
LEADING = {"timestep_spacing": "leading", **OFFSET}
RAMPED = dict.fromkeys(FLAGS.values(), False)
PLAIN = {"clip_sample": (True, False), "thresholding": (False,)}  # the first is the default
MULTISTEP = {**TRAINED, **LINSPACE, **ZERO, **RAMPED, "final_sigmas_type": "zero",
             "use_flow_sigmas": False, "flow_shift": 1.0}  # fmt: skip
SECOND_ORDER = {**ALWAYS, "solver_order": (2,), "thresholding": (False,),
                "use_dynamic_shifting": (False,)}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A scheduler class: our solver, the fields that act with their defaults, and the fixed ones.

    `fixed`: field -> (default, other values ...). The last value is the one that we keep; a
    default that is not the last must be overruled by the file.
    """

    solver: str
    fields: Mapping[str, Any]
    fixed: Mapping[str, tuple] = field(default_factory=lambda: ALWAYS)
    eta: float = 0.0


PEERS = {
    "DDIMScheduler": Peer("ddim", {**TRAINED, **LEADING, **ZERO, "set_alpha_to_one": True},
                          {**ALWAYS, **PLAIN}),
    "PNDMScheduler": Peer("plms", {**TRAINED, **LEADING, "set_alpha_to_one": False},
                          {**ALWAYS, "skip_prk_steps": (False, True)}),
    "DDPMScheduler": Peer("ddim", {**TRAINED, **LEADING, **ZERO},
                          {**ALWAYS, **PLAIN, "variance_type": ("fixed_small",)}, eta=1.0),
    "EulerDiscreteScheduler": Peer(
        "euler", {**TRAINED, **LINSPACE, **ZERO, **RAMPED, "final_sigmas_type": "zero"},
        {**ALWAYS, "interpolation_type": ("linear",), "sigma_min": (None,), "sigma_max": (None,),
         "timestep_type": ("discrete",)}),
    "EulerAncestralDiscreteScheduler": Peer("ddim", {**TRAINED, **LINSPACE, **ZERO}, eta=1.0),
    "HeunDiscreteScheduler": Peer(
        "heun", {**TRAINED, "beta_start": 0.00085, "beta_end": 0.012, **LINSPACE, **RAMPED},
        {**ALWAYS, "clip_sample": (False,)}),
    "DPMSolverMultistepScheduler": Peer(
        "dpmpp2m", MULTISTEP,
        {**SECOND_ORDER, "algorithm_type": ("dpmsolver++",), "solver_type": ("midpoint",),
         "use_lu_lambdas": (False,),
         "lambda_min_clipped": (-float("inf"),), "variance_type": (None,)}),
    "UniPCMultistepScheduler": Peer(
        "unipc", MULTISTEP,
        {**SECOND_ORDER, "predict_x0": (True,), "solver_type": ("bh2",),
         "lower_order_final": (True,), "disable_corrector": ([],), "solver_p": (None,)}),
    "FlowMatchEulerDiscreteScheduler": Peer(
        "euler", {"shift": 1.0, **RAMPED},
        {"num_train_timesteps": (1000,), "use_dynamic_shifting": (False,),
         "invert_sigmas": (False,), "shift_terminal": (None,), "stochastic_sampling": (False,)}),
    "FlowMatchHeunDiscreteScheduler": Peer("heun", {"shift": 1.0},
                                           {"num_train_timesteps": (1000,)}),
}  # fmt: skip
MULTISTEP_CLASSES = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
KNOWN = {name for peer in PEERS.values() for name in (*peer.fields, *peer.fixed)}


def scheduler_from_diffusers(values: Mapping) -> tuple[dict, dict]:
    """A scheduler's config as (process, sampler): `Process`' MEANING, and fields of `Options`.

    Raises ValueError that names class, field and value of what our solvers do not do.
    """
    name = values.get("_class_name")
    if name not in PEERS:
        raise ValueError(
            f"scheduler class {name!r} is unknown{meant(str(name), PEERS)}; known are "
            f"{', '.join(PEERS)}"
        )
    peer = PEERS[name]
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    for key, value in given.items():
        inert = value is None or value is False or key in KNOWN or key in IDLE or key in FOREIGN
        if not inert:
            raise ValueError(f"{name}: {key} is {value!r}, a field that no known scheduler has")
    for key, allowed in peer.fixed.items():
        value, wanted = given.get(key, allowed[0]), allowed[-1]
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            default = "" if key in given else " by default"
            raise ValueError(f"{name}: {key} is {value!r}{default}; only {wanted!r} is known")
    known = {key: given.get(key, default) for key, default in peer.fields.items()}
    if known.get("final_sigmas_type") == "sigma_min":  # else the last step is of first order anyway
        for key, wanted in (("lower_order_final", True), ("euler_at_final", False)):
            if given.get(key, wanted) != wanted and name in MULTISTEP_CLASSES:
                raise ValueError(
                    f"{name}: {key} is {given[key]!r}; with final_sigmas_type 'sigma_min' only "
                    f"{wanted!r} is known"
                )
    try:
        sampler = {"solver": peer.solver, **_grid(known)}
        process = _process(known)
        Process.from_dict(process).times(
            2, sampler["spacing"], **{key: sampler[key] for key in sampler if key != "spacing"}
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return process, sampler | ({"eta": peer.eta} if peer.eta else {})


def trained_for(values: Mapping) -> dict:
    """What a config of any class says of betas and prediction, Stable Diffusion's where it does
    not; raises ValueError where that is no process of ours."""
    known = {key: values[key] for key in (*TRAINED, *ZERO) if key in values}
    return _process({**TRAINED, **STABLE_DIFFUSION, **ZERO, **known})


def with_prediction(process: Mapping, prediction: str) -> dict:
    """The same process where the network predicts something else, one of eps, v and flow.

    Betas and zero terminal SNR stay, but flow is on its own schedule, and eps has no zero SNR.
    """
    if prediction == "flow":
        return dict(FLOW)
    kept = process if process.get("schedule") == "sd" else {}
    kept = {"schedule": "sd", "zero_terminal_snr": False, **kept, "prediction": prediction}
    return kept | ({"zero_terminal_snr": False} if prediction == "eps" else {})


def _process(known: Mapping) -> dict:
    """The process that those fields say; FlowMatch's have none of them."""
    if "prediction_type" not in known:
        return dict(FLOW)
    prediction = known["prediction_type"]
    if known.get("use_flow_sigmas", False):
        if prediction != FLOW_PREDICTION:
            raise ValueError(
                f"prediction_type is {prediction!r}; with use_flow_sigmas only "
                f"{FLOW_PREDICTION!r} is known"
            )
        return dict(FLOW)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction!r}; allowed: {', '.join(PREDICTIONS)}")
    process = Process(
        PREDICTIONS[prediction],
        "sd",
        known.get("rescale_betas_zero_snr", False),
        **{key: known[key] for key in STABLE_DIFFUSION},
    )
    return {key: value for key, value in process.to_dict().items() if key in MEANING}


def _grid(known: Mapping) -> dict:
    """Spacing, offset, final noise and shift, as `Process.times` takes them."""
    ramps = [ramp for ramp, flag in FLAGS.items() if _flag(known, flag)]
    flow = "shift" in known or _flag(known, "use_flow_sigmas")
    shift = {"shift": known.get("shift", known.get("flow_shift", 1.0))} if flow else {}
    final = known.get("final_sigmas_type", "zero")
    if "set_alpha_to_one" in known:
        final = "zero" if _flag(known, "set_alpha_to_one") else "sigma_min"
    if len(ramps) > 1 or (ramps and "use_flow_sigmas" in known and flow):
        used = [*(FLAGS[ramp] for ramp in ramps), *(["use_flow_sigmas"] if flow else [])]
        raise ValueError(f"{' and '.join(used)} exclude each other")
    if flow:
        return {"spacing": ramps[0] if ramps else "linspace", "final": final, **shift}
    spacing = known["timestep_spacing"]
    if spacing not in SPACED:
        raise ValueError(
            f"timestep_spacing is {spacing!r}{meant(str(spacing), SPACED)}; allowed: "
            f"{', '.join(SPACED)}"
        )
    if ramps:
        if "use_flow_sigmas" not in known and spacing != "linspace":  # there the spacing acts
            raise ValueError(
                f"{FLAGS[ramps[0]]} over timestep_spacing {spacing!r} is not known; only over "
                "'linspace'"
            )
        return {"spacing": ramps[0], "final": final}
    offset = {"steps_offset": known["steps_offset"]} if spacing == "leading" else {}
    return {"spacing": spacing, "final": final, **offset}


def _flag(known: Mapping, key: str) -> bool:
    value = known.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; true or false is wanted")
    return bool(value)


def scheduler_to_diffusers(process: Mapping, sampler: Mapping | None = None) -> dict:
    """A scheduler's config for a process, and for how it is sampled where that is given.

    Without `sampler` as Stable Diffusion is published: DDIM over "leading" steps from 1 that ends
    at step 0's noise, over "trailing" ones to zero noise where the process has zero terminal SNR;
    on the flow schedule flow matching. Our "uniform" grid is written as the nearest there is.
    Raises ValueError where no scheduler of diffusers takes such a step.
    """
    known, sampler = Process.from_dict(process), dict(sampler or {})
    if known.schedule == "flow":
        if known.prediction != "flow":
            raise ValueError(
                f"no scheduler of diffusers steps by {known.prediction} on the flow schedule"
            )
        return _flow_to_diffusers(sampler)
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if known.prediction not in predictions:
        raise ValueError(
            f"no scheduler of diffusers steps by {known.prediction} on Stable Diffusion's schedule"
        )
    zero = known.zero_terminal_snr
    if not sampler:
        sampler = {"solver": "ddim", "spacing": "trailing" if zero else "leading",
                   "steps_offset": 0 if zero else 1,
                   "final": "zero" if zero else "sigma_min"}  # fmt: skip
    name = _class_of(sampler)
    spacing = sampler.get("spacing", "uniform")
    values = {
        **{key: getattr(known, key) for key in STABLE_DIFFUSION},
        "prediction_type": predictions[known.prediction],
        "rescale_betas_zero_snr": zero,
        "timestep_spacing": {"uniform": "trailing"}.get(
            spacing, "linspace" if spacing in RAMPS else spacing
        ),
        "steps_offset": sampler.get("steps_offset", 0),
        "set_alpha_to_one": sampler.get("final", "zero") == "zero",
        "final_sigmas_type": sampler.get("final", "zero"),
        **{flag: spacing == ramp for ramp, flag in FLAGS.items()},
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
    }
    return _written(name, values)


def _flow_to_diffusers(sampler: Mapping) -> dict:
    multistep = {"dpmpp2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
    solver, spacing = sampler.get("solver", "euler"), sampler.get("spacing", "uniform")
    shift = float(sampler.get("shift", 1.0))
    if solver in multistep and spacing not in RAMPS:
        peer = PEERS[multistep[solver]]
        values = {**peer.fields, "prediction_type": FLOW_PREDICTION, "use_flow_sigmas": True,
                  "flow_shift": shift}  # fmt: skip
        return _written(multistep[solver], values)
    kind = "Heun" if solver == "heun" and spacing not in RAMPS else "Euler"
    ramps = {flag: spacing == ramp for ramp, flag in FLAGS.items()}
    return _written(f"FlowMatch{kind}DiscreteScheduler", {"shift": shift, **ramps})


def _class_of(sampler: Mapping) -> str:
    """The class of diffusers that samples so on Stable Diffusion's schedule."""
    solver, spacing = sampler.get("solver", "ddim"), sampler.get("spacing", "uniform")
    if solver == "ddim" and sampler.get("eta", 0.0) == 1.0 and spacing not in RAMPS:
        return "EulerAncestralDiscreteScheduler"
    if solver == "ddim" and spacing in RAMPS:
        solver = "euler"  # the same step, whose class has these grids
    return next(name for name, peer in PEERS.items() if peer.solver == solver)


def _written(name: str, values: Mapping) -> dict:
    """A whole config of class `name`; raises ValueError for what the class has no field for."""
    peer = PEERS[name]
    acting = {"rescale_betas_zero_snr": True, "final_sigmas_type": "sigma_min"}
    acting |= dict.fromkeys(FLAGS.values(), True)
    if "set_alpha_to_one" in peer.fields:
        del acting["final_sigmas_type"]
    for key, value in acting.items():
        if values.get(key) == value and key not in peer.fields:
            raise ValueError(
                f"{name} of diffusers has no {key} {value!r}; sample by another solver"
            )
    fixed = {key: allowed[-1] for key, allowed in peer.fixed.items() if key != "lambda_min_clipped"}
    return {"_class_name": name, **fixed, **{key: values[key] for key in peer.fields}}


def described(process: Mapping, sampler: Mapping) -> str:
    """What a source says of its scheduler, in a line for people."""
    known = Process.from_dict(process)
    said = f"predicts {known.prediction}"
    if known.schedule == "sd":
        said += f", {known.beta_schedule} betas {known.beta_start:g} to {known.beta_end:g}"
        said += ", zero terminal SNR" if known.zero_terminal_snr else ""
    else:
        said += " on the flow schedule"
    if not sampler:
        return said
    eta = f" with eta {sampler['eta']:g}" if sampler.get("eta") else ""
    said += f"; sampled by {sampler['solver']}{eta}, {sampler.get('spacing', SPACINGS[0])} spacing"
    if sampler.get("steps_offset"):
        said += f" with offset {sampler['steps_offset']}"
    if sampler.get("shift", 1.0) != 1.0:
        said += f" with shift {sampler['shift']:g}"
    return said + f", final noise {sampler.get('final', 'zero')}"
