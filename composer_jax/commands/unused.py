"""What a user typed and nothing takes: options that act only beside others, tools, config keys.

`args.typed` holds the options on the command line, as `--name`. What lacks its partner is refused;
what the rest of the call makes idle is said in one line.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection, Iterable, Sequence

from ml_collections import ConfigDict

from composer_jax import conditions

log = logging.getLogger("composer_jax")

TOOLS = {
    "--clip": "clip",
    "--depth-weights": "depth",
    "--edge-weights": "edges",
    "--segmenter": "segmenter",
}
PARTS = ("strength", "window", "scale", "region")  # of a condition's options: of its own value
PREPARED = ("image_size", "codec", "clip", "clip_text", "tools", "conditions")
UNPLANNED = (
    "held_out", "held_out_every", "init_any_process", "log_every", "pools", "profile_steps",
    "sample_every", "sampler", "save_every", "seed", "snapshot_every",
)  # fmt: skip


def tell(option: str, why: str) -> None:
    """Says in one line that something on the command line changes nothing."""
    log.warning("%s does nothing: %s", option, why)


def typed_options(words: Sequence[str]) -> set[str]:
    """The options on a command line, as `--name`; says which is there twice, as the last counts."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    for option in dict.fromkeys(one for one in options if options.count(one) > 1):
        log.warning("%s is given more than once; the last counts", option)
    return set(options)


def check_conditions(args: argparse.Namespace, taken: Collection[str]) -> None:
    """Raises ValueError for options of a condition without a value to use them, and for a condition
    that is given twice; `taken`: those that `--use` takes from the image."""
    values = vars(args)
    for name in conditions.names():
        given = values[name] is not None
        if given and name in taken:
            raise ValueError(f"{name} is given by --{name} and by --use; give one of them")
        for part in PARTS:
            if f"--{name}.{part}" in args.typed and not given and name not in taken:
                raise ValueError(
                    f"--{name}.{part} is for the value of --{name} or --use {name}; "
                    "neither is given"
                )


def check_switches(args: argparse.Namespace, prefix: str = "") -> None:
    """Raises ValueError for a switch of a condition whose values, under `prefix`, are not given."""
    values = vars(args)
    for name in conditions.names():
        keys = (f"{prefix}{name}", f"{prefix}{name}.negative")
        for switch in conditions.get(name).switches:
            option = f"{prefix}{name}.{switch}"
            if values[option] and all(values.get(key) is None for key in keys):
                raise ValueError(f"--{option} is for --{keys[0]}, which is not given")


def tell_tools(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Says which tools were named though none of the conditions `names` is taken by them."""
    wanted = {conditions.get(name).tool for name in names}
    for option, tool in TOOLS.items():
        if option in args.typed and tool not in wanted:
            tell(option, why)


def idle_keys(config: ConfigDict) -> dict[str, str]:
    """The keys that change nothing in training beside the rest of the config, and why."""
    mesh, rules = config.mesh.to_dict(), [str(tactic) for _, tactic in config.sharding]
    found = {
        "held_out_every": (not config.held_out, "held_out names no source"),
        "snapshot_every": (not config.ema_lengths, "ema_lengths is empty"),
        "sample_every": (
            config.task not in ("codec", "composer"),
            f"task {config.task} draws no samples",
        ),
        "init_any_process": (not config.get("init_from"), "init_from is empty"),
        "profile_steps": (
            bool(config.profile_steps) and min(config.profile_steps) >= config.steps,
            f"training ends with step {config.steps}",
        ),
        "optimizer.decay": (
            config.optimizer.schedule == "constant",
            "the schedule is constant",
        ),
        "process.density": (
            "process" in config and config.process.schedule == "sd",
            "the schedule sd draws its own steps",
        ),
        "sharding": (mesh["fsdp"] == mesh["tensor"] == 1, "mesh.fsdp and mesh.tensor are 1"),
        "mesh.tensor": (
            mesh["tensor"] > 1 and not any("tensor" in rule for rule in rules),
            "no rule of sharding names it; its devices hold copies",
        ),
    }
    return {key: why for key, (idle, why) in found.items() if idle}


def tell_keys(config: ConfigDict, overrides: Sequence[str], purpose: str = "train") -> None:
    """Says which `key=value` overrides change nothing: of training ("train"), of a cache
    ("prepare") or of what a step costs ("plan")."""
    idle = {} if purpose == "prepare" else idle_keys(config)
    for key in (override.partition("=")[0] for override in overrides):
        group = key.split(".")[0]
        if purpose == "prepare" and group not in PREPARED:
            tell(key, "a cache does not depend on it")
        elif purpose == "plan" and group in UNPLANNED:
            tell(key, "no step's cost depends on it")
        elif key in idle:
            tell(key, idle[key])
