"""What the loop trains: codec, CLIP, depth regressor, composer; each with its loss and batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax import conditions
from composer_jax.data.pipeline import batches
from composer_jax.data.prepare import available, fingerprint, prepare
from composer_jax.data.sources import Source
from composer_jax.data.tools import load_tools
from composer_jax.diffusion.process import Process
from composer_jax.models.blocks import Keys, abstract
from composer_jax.models.clip import Clip, small_clip
from composer_jax.models.composer import Composer, ComposerConfig, Constant, silence
from composer_jax.models.detectors import DepthConfig, DepthRegressor, depth_loss
from composer_jax.models.files import Tensor
from composer_jax.models.pretrained import open_unet
from composer_jax.models.unet import UNetConfig
from composer_jax.models.vae import VAE, VAEConfig, codec_loss, pca_skip, standardised
from composer_jax.storage.models import clip_source, load_codec, replacing, save_model, save_part
from composer_jax.training.state import TrainState
from composer_jax.training.step import Loss, example_keys
from composer_jax.training.warm_start import around

log = logging.getLogger("composer_jax")


@dataclass(frozen=True)
class Task:
    """`init()` gives parameters; `batch(step)` a batch; `export(state)` writes `workdir/model`.

    `start`: trained weights by parameter, which a new run begins with.
    """

    init: Callable[[], Any]
    loss: Loss
    batch: Callable[[int], Any]
    export: Callable[[TrainState], None]
    pool: Mapping[str, Any]
    start: Mapping[str, Tensor] = field(default_factory=dict)


def make_task(config, source: Source, workdir: Path) -> Task:
    """The task that `config.task` names, on a source. Raises ValueError for an unknown one."""
    tasks = {
        "codec": codec_task,
        "clip": clip_task,
        "depth": depth_task,
        "composer": composer_task,
    }
    if config.task not in tasks:
        raise ValueError(f"task {config.task!r}; allowed: {', '.join(tasks)}")
    return tasks[config.task](config, source, workdir)


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def codec_task(config, source: Source, workdir: Path) -> Task:
    """An autoencoder on images alone; exports it standardised by its own latents."""
    pool = prepare(source, (), {}, {}, workdir / "pool", {})
    vae_config = VAEConfig.from_dict(config.model.to_dict())
    dtype = jnp.dtype(config.dtype)

    def create() -> VAE:
        vae = VAE(vae_config, dtype=dtype, rngs=Keys(config.seed))
        if vae_config.linear_skip:
            pca_skip(vae, to_unit(jnp.asarray(pool["image"][:512])))
        return vae

    graph = nnx.graphdef(abstract(VAE, vae_config, dtype=dtype))
    start = nnx.state(create())

    def loss(params, batch, key):
        images = to_unit(batch["image"])
        keys = example_keys(key, images.shape[0])
        vae = nnx.merge(graph, params)
        return codec_loss(vae, images, keys, config.kl_weight, config.edge_weight)

    def export(state: TrainState) -> None:
        vae = nnx.merge(graph, jax.device_get(state.ema))
        moments = np.asarray(nnx.jit(VAE.encode)(vae, to_unit(jnp.asarray(pool["image"][:1024]))))
        vae.config = standardised(vae_config, moments)
        save_part(workdir / "model" / "vae", vae)

    images = {"image": pool["image"]}
    return Task(lambda: start, loss, batches(images, config.batch, config.seed), export, pool)


def clip_task(config, source: Source, workdir: Path) -> Task:
    """A small CLIP of its own vocabulary on image-caption pairs (arXiv 2103.00020)."""
    captions = [
        text
        for start in range(0, min(len(source), 4096), 64)
        for text in source.batch(np.arange(start, min(start + 64, len(source))))["given"]["caption"]
    ]
    clip = small_clip(captions, image_size=source.size, seed=config.seed)
    encoders = {"ids": lambda images, given: clip.tokenize(given["caption"])}
    pool = prepare(source, (), {}, encoders, workdir / "pool", {"seed": config.seed})

    def loss(params, batch, key):
        del key
        return clip.loss(params, batch["image"], batch["ids"])

    def export(state: TrainState) -> None:
        clip.with_params(jax.device_get(state.ema)).save(workdir / "model" / "clip")

    rows = {"image": pool["image"], "ids": pool["ids"]}
    return Task(lambda: clip.params, loss, batches(rows, config.batch, config.seed), export, pool)


def depth_task(config, source: Source, workdir: Path) -> Task:
    """A depth regressor on images whose depth the source knows; it measures samples."""
    pool = prepare(source, ("depth",), {}, {}, workdir / "pool", {})
    model_config, depth = DepthConfig.from_dict(config.model.to_dict()), conditions.get("depth")

    def create() -> DepthRegressor:
        return DepthRegressor(model_config, dtype=config.dtype, rngs=Keys(config.seed))

    graph = nnx.graphdef(nnx.eval_shape(create))

    def loss(params, batch, key):
        del key
        wanted = depth.value(batch["stored"]["depth"])["map"][..., 0]
        return depth_loss(nnx.merge(graph, params), to_unit(batch["image"]), wanted)

    def export(state: TrainState) -> None:
        regressor = nnx.merge(graph, jax.device_get(state.ema))
        save_part(workdir / "model" / "depth", regressor, "float16")

    rows = batches(pool, config.batch, config.seed)
    return Task(lambda: nnx.state(create()), loss, rows, export, pool)


def composer_task(config, source: Source, workdir: Path) -> Task:
    """The composer on latents of a fixed codec and embeddings of a fixed CLIP."""
    vae = load_codec(config.codec)
    clip_text = {"skip": config.clip_text.skip, "pad": config.clip_text.pad or None}
    clip = Clip.load(clip_source(config.clip), **clip_text)
    tools = {"clip": clip, **load_tools(**config.tools)}
    if source.size % vae.factor:
        raise ValueError(f"image size {source.size} is not a multiple of the codec's {vae.factor}")
    names = _conditions(config, source, tools)
    process = Process.from_dict(config.process.to_dict())
    composer_config = ComposerConfig(
        unet=UNetConfig.from_dict(config.model.unet.to_dict()),
        conditions=names,
        sizes=clip.sizes,
        latent_channels=vae.config.latent_channels,
        factor=vae.factor,
        **{key: value for key, value in config.model.items() if key != "unet"},
    )
    start = _start(config, composer_config, process)
    encode = nnx.jit(lambda vae, images: vae.encode(to_unit(images)))

    def moments(images, given):
        del given
        padded = np.concatenate([images, images[:1].repeat(-len(images) % 64, axis=0)])
        return np.asarray(encode(vae, jnp.asarray(padded)))[: len(images)].astype(np.float16)

    made_by = {"vae": fingerprint(nnx.state(vae)), "clip": fingerprint(clip.params)}
    made_by |= {"tools": config.tools.to_dict()}
    pool = prepare(source, names, tools, {"moments": moments}, workdir / "pool", made_by)
    absent = _absent(names, tools)
    dtype = jnp.dtype(config.dtype)

    def create() -> Composer:
        composer = Composer(composer_config, absent, dtype=dtype, rngs=Keys(config.seed))
        for name in names if start else ():
            silence(composer, name)
        return composer

    graph = nnx.graphdef(nnx.eval_shape(create))
    constants = jax.jit(lambda: nnx.state(create(), Constant))()
    keep = jnp.asarray([conditions.get(name).keep_probability for name in names])

    def loss(params, batch, key):
        return composer_loss(
            nnx.merge(graph, params, constants),
            vae,
            process,
            batch,
            key,
            draw_presence=partial(
                draw_presence, keep=keep, drop_all=config.drop_all, keep_all=config.keep_all
            ),
        )

    info = {
        "process": process.to_dict(),
        "image_size": source.size,
        "sampler": config.sampler.to_dict(),
        "source": source.name,
        "clip_text": clip_text,
    }

    def export(state: TrainState) -> None:
        composer = nnx.merge(graph, jax.device_get(state.ema), constants)
        parts = workdir / "parts"
        if not parts.is_dir():  # the fixed networks, written once
            with replacing(parts) as new:
                save_part(new / "vae", vae)
                clip.save(new / "clip")
        save_model(workdir / "model", composer, parts, info | {"step": int(state.step)})

    return Task(
        lambda: nnx.state(create(), nnx.Param),
        loss,
        batches(pool, config.batch, config.seed),
        export,
        pool,
        start,
    )


def _start(config, composer_config: ComposerConfig, process: Process) -> dict[str, Tensor]:
    """The weights that `config.init_from` names, {} for none; raises ValueError where it and the
    config ask for different things."""
    if not config.init_from:
        return {}
    unet = open_unet(config.init_from)
    Process.from_dict(unet.process)  # what is no process is said here
    for key, value in unet.process.items():
        if process.to_dict()[key] != value:
            raise ValueError(
                f"process.{key} is {process.to_dict()[key]!r}; {config.init_from} was trained with "
                f"{value!r}"
            )
    return around(unet, composer_config)


def composer_loss(
    composer: Composer,
    vae: VAE,
    process: Process,
    batch: Mapping[str, Any],
    key: jax.Array,
    draw_presence: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, dict]:
    """Weighted squared error of the network's output; each example draws everything for itself.

    `batch`: image uint8 [B, H, W, 3], moments [B, h, w, 2 c] and the cached conditions' `stored`.
    `draw_presence(key)` gives one example's presence [n]. Returns the loss and metrics.
    """
    names = composer.config.conditions
    known = {name: conditions.get(name) for name in names}
    images = batch["image"].astype(jnp.float32) / 255.0

    def draw(key, image, moments, stored):
        keys = jax.random.split(key, 4 + len(names))
        latent = vae.latents(moments[None].astype(jnp.float32), keys[0])[0]
        eps = jax.random.normal(keys[1], latent.shape)
        t = process.sample_times(keys[2], ())
        values = {
            name: known[name].draw(keys[4 + i], stored.get(known[name].draws_from or name), image)
            for i, name in enumerate(names)
        }
        return latent, eps, t, draw_presence(keys[3]), values

    keys = example_keys(key, images.shape[0])
    x0, eps, t, presence, values = jax.vmap(draw)(keys, images, batch["moments"], batch["stored"])
    t_Bx1x1x1 = t[:, None, None, None]
    x_t = process.diffuse(x0, eps, t_Bx1x1x1)
    encoded, absent = composer.encode(values), composer.encode_absent()
    output = composer(x_t, process.timestep(t), encoded, absent, presence)
    error = jnp.mean((output - process.target(x0, eps, t_Bx1x1x1)) ** 2, axis=(1, 2, 3))
    return jnp.mean(process.loss_weight(t) * error), {"mse": jnp.mean(error)}


def draw_presence(key: jax.Array, keep: jax.Array, drop_all: float, keep_all: float) -> jax.Array:
    """Which conditions one example is given, float32 [n] of 0 and 1 (arXiv 2302.09778, 2.2).

    With probability `drop_all` none, with `keep_all` all, else each by its own `keep` [n].
    """
    key_all, key_each = jax.random.split(key)
    u = jax.random.uniform(key_all)
    each = jax.random.bernoulli(key_each, keep).astype(jnp.float32)
    every = jnp.where(u < drop_all, 0.0, jnp.where(u < drop_all + keep_all, 1.0, -1.0))
    return jnp.where(every < 0.0, each, jnp.broadcast_to(every, each.shape))


def _conditions(config, source: Source, tools: Mapping[str, Any]) -> tuple[str, ...]:
    """The config's conditions, or all that this source and these tools can give."""
    if config.conditions:
        for name in config.conditions:
            conditions.get(name)
        return tuple(config.conditions)
    reasons = available(source, tools)
    for name, reason in reasons.items():
        if reason:
            log.warning("trained without %s: %s", name, reason)
    return tuple(name for name, reason in reasons.items() if reason is None)


def _absent(names, tools: Mapping[str, Any]) -> dict:
    """Values of the conditions whose absence is encoded, one example each."""
    values = {}
    for name in names:
        condition = conditions.get(name)
        stored = condition.absent(tools.get(condition.tool))
        if stored is not None:
            values[name] = condition.value(stored)
    return values
