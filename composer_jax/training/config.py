"""An experiment is one config file plus overrides; here they are found, checked and kept."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import logging
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from composer_jax.conditions.base import meant
from composer_jax.training.schema import check_together, check_values
from composer_jax.utils.atomic import write_json
from composer_jax.utils.claims import differing, plain, read_claim
from composer_jax.utils.values import expand_user

log = logging.getLogger("composer_jax")

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
# in a run's folder; and what tells that it is a cache's
WRITTEN = ("model", "parts", "samples", "ema", "metrics.jsonl", "composer.json")
STAY = ("optimizer.name", "optimizer.mu_dtype")  # of these: what an optimizer's state is made of


def defaults() -> ConfigDict:
    """What every experiment's config has, however it trains; `get_config` sets the rest."""
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"  # of computation; parameters and averages are float32
    config.precision = (
        "default"  # of float32's products: TF32 on GPUs, bfloat16 on TPUs; or highest
    )
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

    Raises ValueError, one line, for an unknown config, variant or key, a file that makes no config,
    or a value that `training/schema.py` does not allow.
    """
    path, _, variant = text.partition(":")
    if path.endswith(".py"):
        module = python_file(path)
    else:
        import composer_jax.configs as package

        found = pkgutil.iter_modules(package.__path__)
        known = [info.name for info in found if not info.ispkg]  # those are sweeps
        if path not in known:
            raise ValueError(f"no config {path!r}{meant(path, known)}; there are "
                             f"{', '.join(known)}, or give a .py file")  # fmt: skip
        module = importlib.import_module(f"composer_jax.configs.{path}")
    config = called(module, "get_config", path, *([variant] if variant else []))
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path}: get_config() returns a {type(config).__name__}; an ml_collections ConfigDict "
            "is wanted, as training.config.defaults() gives"
        )
    with explained(path):
        config = ConfigDict(config)  # no longer frozen or locked
        for key, value in flat(config).items():
            if hasattr(value, "tolist"):  # numpy's
                _set(config, key, value.tolist())
            elif isinstance(value, str):
                _set(config, key, expand_user(value))
    for override in overrides:
        _override(config, override)
    check_values(flat(config))
    check_together(config)
    return config.lock()


def called(module: ModuleType, name: str, path: str, *arguments: str) -> Any:
    """What a function of a config or sweep file returns; raises ValueError, one line naming the
    file and its line, where it has none or it fails."""
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no {name}()")
    if arguments and not inspect.signature(function).parameters:
        raise ValueError(f"{path} has no variants, and {arguments[0]!r} is asked for")
    with explained(path):
        return function(*arguments) if arguments or not _needed(function) else function("")


def _needed(function: Callable) -> bool:
    """Whether a function cannot be called without arguments."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
               for p in parameters)  # fmt: skip


def python_file(path: str) -> ModuleType:
    """The module that a .py file makes; raises ValueError, one line naming the file and its line,
    where there is none or it fails."""
    if not Path(path).is_file():
        raise ValueError(f"config file {path} does not exist")
    spec = importlib.util.spec_from_file_location("composer_config", path)
    module = importlib.util.module_from_spec(spec)
    with explained(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns an error of somebody's .py file into a ValueError that names its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not path.endswith(".py"):  # ours
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == Path(path).resolve()]
        kind, reason = f"{type(error).__name__}: ", str(error)
        if isinstance(error, SyntaxError):
            lines, reason = [error.lineno], error.msg
        elif isinstance(error, ValueError):
            kind = ""
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{path}{where}: {kind}{reason}") from error


def _override(config: ConfigDict, override: str) -> None:
    """Sets the key that `KEY=VALUE` names."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--config.{key} wants a value: --config.{key}=VALUE")
    values = flat(config)
    if key not in values:
        if group := [name for name in values if name.startswith(f"{key}.")]:
            raise ValueError(f"config key {key} is a group; set one of {', '.join(group)}")
        raise ValueError(
            f"the config has no key {key!r}{meant(key, list(values))}; it has {', '.join(values)}"
        )
    _set(config, key, _read(text, values[key]))


def _set(config: ConfigDict, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node = functools.reduce(lambda node, name: node[name], parents, config)
    with node.ignore_type():
        node[leaf] = value


def _read(text: str, old: Any) -> Any:
    """What `text` says, of the type of `old` where it can be; `check_values` sees to the rest."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        if isinstance(old, tuple | list):
            value = tuple(text.split(",")) if text.strip() else ()
    if isinstance(old, tuple | list) and not isinstance(value, tuple | list):
        value = (value,)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    return value


def flat(config: ConfigDict, prefix: str = "") -> dict:
    """Dotted key -> value of everything in a config."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        found |= flat(value, name) if isinstance(value, ConfigDict) else {name: value}
    return found


def check_kept(config: ConfigDict, workdir: Path, begun: bool = True) -> None:
    """Raises ValueError where `workdir` cannot go on with this config, and writes nothing.

    A run that has `begun` must have the config that `workdir/config.json` says; the first key that
    differs is named. `MAY_CHANGE` lists what may, but `STAY`. What a run would write over, in a
    folder that holds none, is refused, too.
    """
    path, new = workdir / "config.json", plain(flat(config))
    saved = any((workdir / "checkpoints").glob("[0-9]*"))
    try:
        old = read_claim(path, "delete it to go on from the checkpoints" if saved else "")
    except ValueError:
        if saved:
            raise
        log.warning("%s is damaged; it is written again", path)
        return
    if old is None:
        for name in WRITTEN if not saved else ():
            if (workdir / name).exists():
                raise ValueError(f"{workdir} holds {name}, of no run; give another --workdir")
        return
    if "optimizer.name" not in old:
        raise ValueError(f"{path} is of something else than a run; give another --workdir")
    if not begun:  # it ended before its first checkpoint
        return
    old = plain(flat(defaults())) | old  # which may be older than a key
    key = differing(old, new, lambda key: key.split(".")[0] in MAY_CHANGE and key not in STAY)
    if key:
        raise ValueError(
            f"{workdir} holds a run with {key} = {old.get(key)!r}, the config says "
            f"{new.get(key)!r}; give another --workdir or the same config"
        )


def keep_config(config: ConfigDict, workdir: Path, begun: bool = True) -> None:
    """Writes `workdir/config.json`; raises ValueError as `check_kept`, `WriteError`."""
    check_kept(config, workdir, begun)
    write_json(workdir / "config.json", flat(config))
