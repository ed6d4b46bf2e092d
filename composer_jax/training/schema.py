"""What each key of a config may be; every key of every config is in one of these tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from composer_jax import conditions
from composer_jax.conditions.base import meant
from composer_jax.data.sources import check_source
from composer_jax.data.stream import is_cache
from composer_jax.diffusion.process import (
    BETA_SCHEDULES,
    DENSITIES,
    LOCATION,
    PREDICTIONS,
    SCHEDULES,
    Process,
)
from composer_jax.diffusion.settings import SETTINGS, check_settings
from composer_jax.models.composer import STEMS, VECTORS
from composer_jax.models.detectors import PATCH
from composer_jax.models.unet import REMAT, UNetConfig
from composer_jax.models.vae import VAEConfig
from composer_jax.training.ema import LONGEST, SHORTEST
from composer_jax.training.optimizer import MU_DTYPES, OPTIMIZERS
from composer_jax.training.optimizer import SCHEDULES as DECLINES
from composer_jax.training.sharding import TACTICS
from composer_jax.utils.precision import PRECISIONS
from composer_jax.utils.values import (
    PATTERN,
    SEED,
    SHARE,
    YES,
    Allowed,
    choice,
    many,
    maybe,
    number,
    pair,
    text,
    whole,
)

BATCH = whole(1, 2**20)
DTYPES = ("float32", "bfloat16")  # of computation
NAME, MAYBE_NAME = text(), text(empty=True)
SIZE, WIDTHS = whole(1, 2**16), many(whole(1, 2**16), 1, 16)
AXIS = Allowed("-1, or a whole number from 1 to 65536,", lambda v: v == -1 or SIZE.holds(v))
CHANCE = maybe(SHARE)

COMMON: dict[str, Allowed] = {
    "source": NAME,
    "image_size": whole(1, 16_384),
    "seed": SEED,
    "steps": whole(1),
    "batch": BATCH,
    "dtype": choice(*DTYPES),
    "precision": choice(*PRECISIONS),
    "accumulate": SIZE,
    "trainable": PATTERN,
    "optimizer.name": choice(*OPTIMIZERS),
    "optimizer.learning_rate": number(0.0, 10.0, above=True),
    "optimizer.warmup": whole(0),
    "optimizer.schedule": choice(*DECLINES),
    "optimizer.decay": SHARE,
    "optimizer.weight_decay": number(0.0, 10.0),
    "optimizer.clip": number(0.0, 1e9, above=True),
    "optimizer.betas": many(number(0.0, 1.0, below=True), 2, 2),
    "optimizer.mu_dtype": choice(*MU_DTYPES),
    "optimizer.groups": many(
        pair(PATTERN, number(0.0, 1000.0)),
        0,
        1000,
        wanted="a list of (regular expression, factor from 0 to 1000) pairs, as (('stem', 0.1),),",
    ),
    "ema": number(0.0, 1.0, below=True),
    "ema_lengths": many(number(SHORTEST, LONGEST), 0, 16, different=True),
    "snapshot_every": whole(1),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.tensor": AXIS,
    "sharding": many(
        pair(PATTERN, choice(*TACTICS)),
        0,
        1000,
        wanted="a list of (regular expression, tactic) pairs, as (('kernel', 'fsdp'),), with a "
        f"tactic of {', '.join(TACTICS)},",
    ),
    "log_every": whole(1),
    "save_every": whole(1),
    "sample_every": whole(0),  # 0: never
    "held_out": MAYBE_NAME,
    "held_out_every": whole(1),
    "pools": MAYBE_NAME,
    "profile_steps": many(whole(1), 0, 2),
}
UNET: dict[str, Allowed] = {
    "in_channels": SIZE,
    "out_channels": SIZE,
    "block_out_channels": WIDTHS,
    "attention": many(YES, 1, 16),
    "heads": many(whole(1, 2**16), 1, 16),
    "layers_per_block": whole(1, 64),
    "cross_attention_dim": SIZE,
    "use_linear_projection": YES,
    "norm_num_groups": SIZE,
    "patch": SIZE,
}
PROCESS: dict[str, Allowed] = {
    "prediction": choice(*PREDICTIONS),
    "schedule": choice(*SCHEDULES),
    "zero_terminal_snr": YES,
    "beta_schedule": choice(*BETA_SCHEDULES),
    "beta_start": number(0.0, 1.0, above=True, below=True),
    "beta_end": number(0.0, 1.0, above=True, below=True),
    "min_snr": maybe(number(0.0, 1e6, above=True)),
    "density": choice(*DENSITIES),
    "location": number(-LOCATION, LOCATION),
}
DENSE = {"widths": many(whole(1, 2**16), 2, 2), "norm_num_groups": SIZE}
WORDS = many(NAME, 1, 1000, different=True)


def _in(group: str, keys: Mapping[str, Allowed]) -> dict[str, Allowed]:
    return {f"{group}.{key}": allowed for key, allowed in keys.items()}


TASKS: dict[str, dict[str, Allowed]] = {
    "composer": {
        "codec": NAME,
        "clip": NAME,
        "clip_text.skip": whole(0, 100),
        "clip_text.pad": MAYBE_NAME,
        **_in("tools", dict.fromkeys(("depth", "segmenter", "edges"), MAYBE_NAME)),
        "init_from": MAYBE_NAME,
        "init_any_process": YES,
        "conditions": many(NAME, 0, 1000, different=True),
        "remat": choice(*REMAT),
        **_in("model.unet", UNET),
        "model.local_channels": SIZE,
        "model.stems": choice(*STEMS),
        "model.stem_width": SIZE,
        "model.vectors": choice(*VECTORS),
        "model.tokens_per_vector": SIZE,
        "model.context_length": SIZE,
        **_in("process", PROCESS),
        "keep": CHANCE,
        "keep_maps": CHANCE,
        "drop_all": SHARE,
        "keep_all": SHARE,
        **_in("sampler", SETTINGS),
    },
    "codec": {
        **_in("model", {key: UNET[key] for key in ("in_channels", "block_out_channels")}),
        "model.latent_channels": SIZE,
        "model.layers_per_block": UNET["layers_per_block"],
        "model.norm_num_groups": SIZE,
        "model.patch": SIZE,
        "model.mid_attention": YES,
        "model.linear_skip": YES,
        "model.latent_mean": many(number(-1e6, 1e6), 1, 2**16),
        "model.latent_std": many(number(0.0, 1e6, above=True), 1, 2**16),
        "norm": choice("l1", "l2"),
        "kl_weight": number(0.0, 1e6),
        "edge_weight": number(0.0, 1e6),
    },
    "clip": {"altered": whole(0, 64)},
    "depth": _in("model", DENSE),
    "objects": _in("model", DENSE | dict.fromkeys(("shapes", "colours", "sizes"), WORDS)),
}
# keys and groups of keys that have a default where they are read
OPTIONAL = ("process", "sampler", "model", "keep_each", "remat", "norm", "keep", "keep_maps")


def allowed_keys(task: str) -> dict[str, Allowed]:
    """Dotted key -> what it may be, of all that a config of a task may have. Raises ValueError for
    an unknown task."""
    choice(*TASKS).check("config key task", task)
    keys = {"task": choice(task), **COMMON, **TASKS[task]}
    if task == "composer":
        keys |= {f"keep_each.{name}": CHANCE for name in conditions.names()}
    return keys


def all_keys() -> set[str]:
    """The keys of all tasks' configs."""
    return {key for task in TASKS for key in allowed_keys(task)}


def check_values(values: Mapping[str, Any]) -> None:
    """Raises ValueError, one line naming the key, the value and what is allowed, where a config's
    `values`, by dotted key, are not what a task takes: key by key, then together."""
    if "task" not in values:
        raise ValueError(f"the config lacks the key 'task', one of {', '.join(TASKS)}")
    allowed = allowed_keys(values["task"])
    for key, value in values.items():
        if key not in allowed:
            raise ValueError(
                f"a config of task {values['task']!r} has no key {key!r}{meant(key, list(allowed))}"
            )
        allowed[key].check(f"config key {key}", value)
    for key in allowed:
        if key not in values and key.partition(".")[0] not in OPTIONAL:
            raise ValueError(f"the config lacks the key {key!r}: {allowed[key].wanted}")


def check_together(config: ConfigDict) -> None:
    """Raises ValueError where values that are each allowed do not go together."""
    _check_run(config)
    for key in ("source", "held_out"):
        if config[key] and not is_cache(config[key]):
            check_source(config[key])
    if config.task == "composer":
        for name in config.conditions:
            conditions.get(name)
        _make(Process, config.process, "process")
        check_settings(config.sampler.to_dict(), "config key sampler.")
        if config.drop_all + config.keep_all > 1:
            raise ValueError(
                f"config keys drop_all and keep_all are {config.drop_all} and {config.keep_all}; "
                "together at most 1 is wanted"
            )
        _make(UNetConfig, config.model.unet, "model.unet")
        unet, local = config.model.unet, config.model.local_channels
        if config.model.stems == "convolutions" and unet.in_channels != unet.out_channels + local:
            raise ValueError(
                f"config key model.unet.in_channels is {unet.in_channels}; model.unet.out_channels "
                f"+ model.local_channels, {unet.out_channels + local}, is wanted"
            )
    elif config.task == "codec":
        _check_side(config, _make(VAEConfig, config.model, "model").factor)
    elif config.task in ("depth", "objects"):
        _check_side(config, 2 * PATCH)
        for width in config.model.widths:
            if width % config.model.norm_num_groups:
                raise ValueError(
                    f"config key model.widths is {tuple(config.model.widths)}; multiples of "
                    f"model.norm_num_groups, {config.model.norm_num_groups}, are wanted"
                )


def _check_side(config: ConfigDict, multiple: int) -> None:
    if config.image_size % multiple:
        raise ValueError(
            f"config key image_size is {config.image_size}; a multiple of {multiple} is wanted"
        )


def _make(kind: Any, values: ConfigDict, prefix: str) -> Any:
    try:
        return kind.from_dict(values.to_dict())
    except ValueError as error:
        raise ValueError(f"config key {prefix}.{error}") from error


def _check_run(config: ConfigDict) -> None:
    if config.batch % config.accumulate:
        raise ValueError(
            f"config key accumulate is {config.accumulate}: it must divide the batch of "
            f"{config.batch}"
        )
    sizes = tuple(config.mesh.values())
    if sizes.count(-1) > 1:
        raise ValueError(f"config key mesh is {config.mesh.to_dict()}: at most one size may be -1")
    window = tuple(config.profile_steps)
    if window and not (len(window) == 2 and window[0] < window[1]):
        raise ValueError(
            f"config key profile_steps is {window}; a first and a later last step are wanted, or ()"
        )
    if config.ema_lengths and config.task != "composer":
        raise ValueError(f"config key ema_lengths is for task composer, not {config.task}")
