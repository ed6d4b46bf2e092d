"""An experiment is one config file plus overrides; here they are found, checked and kept."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from composer_jax.conditions.base import meant

# what may change when a run goes on; everything else would make it another run
MAY_CHANGE = (
    "steps",
    "log_every",
    "save_every",
    "sample_every",
    "held_out",
    "held_out_every",
    "pools",
    "init_any_process",
    "mesh",
    "sharding",
    "remat",
    "sampler",
    "optimizer",
    "ema",
    "accumulate",
    "profile_steps",
    "snapshot_every",
)
STAY = ("optimizer.name", "optimizer.mu_dtype")  # of these: what an optimizer's state is made of
# numbers under these divide by zero or train nothing
LEAST = {
    "seed": 0,
    "image_size": 1,
    "steps": 1,
    "batch": 1,
    "log_every": 1,
    "save_every": 1,
    "snapshot_every": 1,
    "held_out_every": 1,
    "sample_every": 0,  # never
    "altered": 0,
}


def defaults() -> ConfigDict:
    """What every experiment's config has, however it trains; `get_config` sets the rest."""
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"  # of computation; parameters and averages are float32
    config.accumulate = 1  # parts that a batch is taken in, for less memory
    config.trainable = ""  # a regular expression on parameters' names; empty: all
    config.optimizer = dict(
        name="adamw",  # or muon
        learning_rate=1e-3,
        warmup=100,  # steps
        schedule="linear",  # or cosine, rsqrt, constant: how it falls
        decay=0.33,  # over this last share of the steps
        weight_decay=0.0,
        clip=1.0,
        betas=(0.9, 0.99),
        mu_dtype="float32",  # of the first moment; or bfloat16: 2 bytes less a parameter
        groups=(),  # (pattern on parameters' names, factor of the learning rate) pairs
    )
    config.ema = 0.999
    config.ema_lengths = ()  # (0.05, 0.1): for `composer ema`
    config.snapshot_every = 1000  # of these averages
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.sharding = (("kernel", "fsdp"),)
    config.log_every = 20
    config.save_every = 500
    config.sample_every = 0
    config.held_out = ""  # a source that is never trained on, for its loss in the log and for grids
    config.held_out_every = 500
    config.pools = ""  # where sources taken apart are kept, for all runs on them; empty: workdir
    config.profile_steps = ()  # (10, 15): a profile of these steps, for TensorBoard
    return config


def load_config(text: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config that `NAME[:variant]` or `FILE.py[:variant]` names, with `key=value` overrides.

    Raises ValueError, one line, for an unknown config, variant or key, or a value of another type
    or under the least that makes sense.
    """
    path, _, variant = text.partition(":")
    if path.endswith(".py"):
        module = python_file(path)
    else:
        import composer_jax.configs as package

        known = [info.name for info in pkgutil.iter_modules(package.__path__)]
        if path not in known:
            raise ValueError(f"no config {path!r}{meant(path, known)}; there are "
                             f"{', '.join(known)}, or give a .py file")  # fmt: skip
        module = importlib.import_module(f"composer_jax.configs.{path}")
    config = module.get_config(variant).lock()
    for override in overrides:
        _override(config, override)
    for key, least in LEAST.items():
        if config.get(key, least) < least:
            raise ValueError(f"config key {key} is {config[key]}; at least {least} is wanted")
    return config


def python_file(path: str) -> ModuleType:
    """The module that a .py file makes; raises ValueError where there is none."""
    if not Path(path).is_file():
        raise ValueError(f"config file {path} does not exist")
    spec = importlib.util.spec_from_file_location("composer_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _override(config: ConfigDict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"--config.{key} wants a value: --config.{key}=VALUE")
    *parents, leaf = key.split(".")
    node = config
    for i, name in enumerate([*parents, leaf]):
        if not isinstance(node, ConfigDict) or name not in node:
            known = list(flat(config))
            raise ValueError(f"the config has no key {key!r}{meant(key, known)}; "
                             f"it has {', '.join(known)}")  # fmt: skip
        if i < len(parents):
            node = node[name]
    node[leaf] = _convert(key, value, node[leaf])


def _convert(key: str, text: str, old):
    """`text` as the type of `old`."""
    if isinstance(old, ConfigDict):
        raise ValueError(f"config key {key} is a group; set one of {', '.join(flat(old, key))}")
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(old, tuple | list):
            value = tuple(word for word in text.split(",") if word)
    if isinstance(old, tuple | list) and not isinstance(value, tuple | list):
        value = (value,)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if old is None and (value is None or isinstance(value, int | float)):
        return value
    same = isinstance(value, tuple | list) if isinstance(old, tuple | list) else (
        type(value) is type(old))  # fmt: skip
    if not same:
        kind = type(old).__name__
        raise ValueError(f"config key {key} is of type {kind} (now {old!r}); {text!r} is not")
    return value


def flat(config: ConfigDict, prefix: str = "") -> dict:
    """Dotted key -> value of everything in a config."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        found |= flat(value, name) if isinstance(value, ConfigDict) else {name: value}
    return found


def keep_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`; a run that goes on must have the same config.

    Raises ValueError naming the first key that differs; `MAY_CHANGE` lists what may, but `STAY`.
    """

    def plain(config: ConfigDict) -> dict:
        return json.loads(json.dumps(flat(config)))

    path, new = workdir / "config.json", plain(config)
    if path.is_file():
        old = plain(defaults()) | json.loads(path.read_text())  # which may be older than a key
        for key in sorted(old.keys() | new.keys()):
            may = key.split(".")[0] in MAY_CHANGE and key not in STAY
            if not may and old.get(key) != new.get(key):
                raise ValueError(
                    f"{workdir} holds a run with {key} = {old.get(key)!r}, the config says "
                    f"{new.get(key)!r}; give another --workdir or the same config"
                )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(new, indent=2) + "\n")
