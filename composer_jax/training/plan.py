"""Ahead of time: the real train step compiled for hardware that need not be there, and its cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from composer_jax import conditions
from composer_jax.conditions.base import Condition, meant
from composer_jax.data.cache import feature_specs, nested
from composer_jax.models.composer import ComposerConfig
from composer_jax.models.files import read_json
from composer_jax.models.unet import UNetConfig
from composer_jax.models.vae import VAEConfig
from composer_jax.storage.models import find_part
from composer_jax.training.collectives import Traffic, collectives
from composer_jax.training.composer import make_recipe
from composer_jax.training.hardware import Chip, chip_of, compiler_options
from composer_jax.training.optimizer import make_optimizer
from composer_jax.training.sharding import batch_sharding, make_mesh, shard_tree
from composer_jax.training.state import abstract_state
from composer_jax.training.step import jit_step, only
from composer_jax.utils.precision import matmul_precision

MOST = 64  # examples a device: tiny models have room for thousands, and XLA no end with them
CLIP_SIZES = {  # text_length, text_width, embed_width
    "openai/clip-vit-large-patch14": (77, 768, 768),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (77, 1024, 1024),
}


@dataclass(frozen=True)
class Cost:
    """What one compiled step costs; bytes and FLOPs are one device's.

    `seconds`: the compiler's estimate of a step, None where it makes none that makes sense.
    `compile_seconds`: how long the compiler took.
    """

    batch: int
    devices: int
    arguments: int
    temporaries: int
    peak: int
    flops: float
    bytes: float
    seconds: float | None
    collectives: dict[str, Traffic]
    compile_seconds: float

    def to_dict(self, chip: Chip | None) -> dict[str, Any]:
        """As JSON's types, with what follows from the chip where it is known."""
        rate = self.batch / self.seconds if self.seconds else None
        known = chip is not None
        share = known and self.seconds and self.flops / self.seconds / chip.flops
        return asdict(self) | {
            "batch_per_device": self.batch / self.devices,
            "images_per_second": rate,
            "memory": chip.memory if known else None,
            "peak_share_of_memory": self.peak / chip.memory if known else None,
            "share_of_peak_flops": share or None,
        }


def compile_step(config, devices: list, batch: int) -> tuple[Any, str]:
    """The composer's train step of a config, compiled for `devices`, and its text.

    No weights and no data are read: `init_from` is not looked at, conditions are the config's or
    all there are. Raises ValueError for another task, or where parts do not fit.
    """
    mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or batch % parts:
        raise ValueError(f"batch {batch} is no multiple of the {parts} parts of data x fsdp")
    params, loss, shapes = _composer(config, batch)
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    loss, optimizer = only(config.trainable, loss, optimizer)
    lengths = tuple(config.ema_lengths)
    abstract = abstract_state(params, optimizer, lengths)
    shardings = shard_tree(abstract, mesh, tuple(config.sharding))

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    state = jax.tree.map(placed, abstract, shardings)
    rows = jax.tree.map(lambda s: placed(s, batch_sharding(mesh)), shapes)
    seed = placed(jax.ShapeDtypeStruct((2,), jnp.uint32), NamedSharding(mesh, PartitionSpec()))
    jitted = jit_step(shardings, loss, optimizer, config.ema, config.accumulate, config.dtype)
    platform = devices[0].platform
    platform = "cuda" if platform == "gpu" else platform
    with jax.set_mesh(mesh), matmul_precision(config.get("precision")):
        lowered = jitted.trace(state, rows, seed).lower(lowering_platforms=(platform,))
    return compile_readably(lowered, devices[0])


def compile_readably(lowered, device, options=None) -> tuple[Any, str]:
    """A lowered program, compiled, and its optimised HLO as text.

    `options`: the compiler's, instead of those that training takes. A TPU's compiler writes the
    text to a folder: jax cannot read back what it says of asynchronous operations.
    """
    options = compiler_options(device) if options is None else dict(options)
    if device.platform != "tpu":
        compiled = lowered.compile(options)
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        options |= {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(options)
        texts = [path.read_text() for path in Path(folder).glob("*.after_optimizations.txt")]
    return compiled, max(texts, key=len, default="")


def measure(compiled, text: str, batch: int, devices: int, seconds: float) -> Cost:
    """The cost of a compiled step and its text; `seconds`: how long it took to compile."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    estimate = cost.get("optimal_seconds", -1.0)
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if peak < arguments + temporaries:  # XLA for CPUs leaves the temporaries out
        peak = arguments + temporaries + fresh
    return Cost(
        batch=batch,
        devices=devices,
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        flops=float(cost.get("flops", 0.0)),
        bytes=float(cost.get("bytes accessed", 0.0)),
        seconds=float(estimate) if estimate > 0 else None,
        collectives=collectives(text),
        compile_seconds=seconds,
    )


def plan(config, devices: list, batch: int) -> Cost:
    """Compiles a step at a global batch and measures it; raises ValueError as `compile_step`."""
    start = time.perf_counter()
    compiled, text = compile_step(config, devices, batch)
    return measure(compiled, text, batch, len(devices), time.perf_counter() - start)


def largest(
    measured: Callable[[int], Cost | None], memory: int, most: int = MOST
) -> tuple[Cost | None, int | None]:
    """The cost at the largest batch per device that fits into `memory`, None where not even 1 does.

    `measured(n)`: the cost at n examples a device, None where the compiler finds no room. Memory
    grows by a line in n, but not yet while what a step needs anyway is more: then n goes up
    fourfold. The answer is compiled; where the line led too far, it is within a sixteenth. More
    than `most` are not compiled: where these fit, the second is how many the line leads to, and
    None elsewhere.
    """
    tried: dict[int, Cost | None] = {}

    def fits(n: int) -> bool:
        tried[n] = measured(n)
        return tried[n] is not None and tried[n].peak <= memory

    if not fits(1):
        return None, None
    low, high, n = 1, None, min(2, most)
    leads = n
    while n > low and (high is None or high - low > low // 16):
        if fits(n):
            grown = tried[n].peak - tried[low].peak
            room = memory - tried[n].peak
            leads = n + (room * (n - low) // grown if grown > 0 else 3 * n)
            low = n
        else:
            high, leads = n, (low + n) // 2
        n = min(leads, most if high is None else high - 1)
    return tried[low], leads if leads > low == most else None


def known_chip(devices: list) -> Chip | None:
    """The chip that these devices are, None for CPUs and what the table lacks."""
    return chip_of(devices[0].device_kind)


def composer_config(config) -> tuple[ComposerConfig, dict]:
    """The composer that a config trains, of its conditions or of all there are, and zeros for the
    values of those whose absence is encoded; nothing but the shapes of codec and CLIP is read."""
    names = tuple(config.conditions) or tuple(conditions.names())
    for name in names:
        conditions.get(name)
    sizes, codec = clip_sizes(config.clip), codec_config(config.codec)
    model = {key: value for key, value in config.model.items() if key != "unet"}
    unet = UNetConfig.from_dict(config.model.unet.to_dict())
    shape = ComposerConfig(unet, names, sizes, codec.latent_channels, codec.factor, **model)
    absent = {
        name: {key: jnp.zeros(part.shape) for key, part in shape.parts(name).items()}
        for name in names
        if type(conditions.get(name)).absent is not Condition.absent
    }
    return shape, absent


def _composer(config, batch: int):
    """Parameters, unread, loss and the shapes of a batch."""
    if config.task != "composer":
        raise ValueError(f"task {config.task!r} has no plan; allowed: composer")
    shape, absent = composer_config(config)
    codec = codec_config(config.codec)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = ""
    recipe = make_recipe(config, shape.conditions, shape.sizes, codec, absent)
    shapes = batch_shapes(config, shape.conditions, shape.sizes, codec, batch)
    return recipe.params, recipe.loss, shapes


def batch_shapes(
    config, names, sizes: Mapping[str, int], codec: VAEConfig, batch: int
) -> dict[str, Any]:
    """Shapes of what a step takes: images, moments, and what the conditions store."""
    codec_sizes = {"factor": codec.factor, "latent_channels": codec.latent_channels}
    specs = feature_specs(names, {**sizes, **codec_sizes}, config.image_size)
    shapes = {
        path: jax.ShapeDtypeStruct((batch, *spec.shape), spec.dtype)
        for path, spec in specs.items()
        if spec.dtype != "str"
    }
    return {"stored": {}} | nested(shapes)


def clip_sizes(where: str) -> dict[str, int]:
    """What a CLIP decides, by a published name or from the config of "bundled" or a folder."""
    names = ("text_length", "text_width", "embed_width")
    if where in CLIP_SIZES:
        return dict(zip(names, CLIP_SIZES[where], strict=True))
    if where != "bundled" and not Path(where).exists():
        raise ValueError(f"clip {where!r}{meant(where, list(CLIP_SIZES))}: sizes are known for "
                         f"{', '.join(CLIP_SIZES)}; or give a folder, or 'bundled'")  # fmt: skip
    values = read_json(find_part(where, "clip") / "config.json")
    text = values.get("text_config") or {}
    try:
        sizes = (text["max_position_embeddings"], text["hidden_size"], values["projection_dim"])
    except KeyError as error:
        raise ValueError(f"{where}'s CLIP config lacks {error}") from error
    return dict(zip(names, sizes, strict=True))


def codec_config(where: str) -> VAEConfig:
    """The codec of "bundled" or a folder, by its config; Stable Diffusion's by a hub name."""
    if where != "bundled" and not Path(where).exists():
        if "/" not in where:
            raise ValueError(f"codec {where!r} is no folder, no hub's owner/name and not 'bundled'")
        return VAEConfig()
    values = read_json(find_part(where, "vae") / "config.json")
    if "format" in values:
        own = {key: value for key, value in values.items() if key not in ("format", "kind")}
        return VAEConfig.from_dict(own)
    return VAEConfig(
        latent_channels=values["latent_channels"],
        block_out_channels=tuple(values["block_out_channels"]),
    )
