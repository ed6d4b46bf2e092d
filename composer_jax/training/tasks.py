"""What the loop trains: codec, CLIP, depth regressor, composer; each with its loss and batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from composer_jax.models.blocks import Keys, abstract
from composer_jax.models.clip import Clip, small_clip
from composer_jax.models.detectors import DepthConfig, DepthRegressor, depth_loss
from composer_jax.models.files import Tensor, module_tensors
from composer_jax.models.vae import VAE, VAEConfig, codec_loss, pca_skip, standardised
from composer_jax.storage.models import clip_source, load_codec, replacing, save_model, save_part
from composer_jax.training.cluster import share
from composer_jax.training.composer import make_recipe
from composer_jax.training.sharding import make_mesh
from composer_jax.training.step import Loss

log = logging.getLogger("composer_jax")


@dataclass(frozen=True)
class Task:
    """`init()` gives parameters; `batch(step)` this process's part of a batch.

    `export(params, step)` writes `workdir/model`; `start`: trained weights by parameter, which a
    new run begins with; `tensors(params)`: a composer's trained tensors by name.
    """

    init: Callable[[], Any]
    loss: Loss
    batch: Callable[[int], Any]
    export: Callable[[Any, int], None]
    pool: Mapping[str, Any]
    start: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Callable[[Any], dict[str, Tensor]] | None = None


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


def _batches(config, rows) -> Callable[[int], Any]:
    """This process's part of each batch, by the rows that its devices take."""
    part = share(make_mesh(**config.mesh), config.batch)
    return batches(rows, config.batch, config.seed, part)


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

    def loss(params, batch, keys):
        images = to_unit(batch["image"])
        vae = nnx.merge(graph, params)
        return codec_loss(vae, images, keys, config.kl_weight, config.edge_weight)

    def export(params, step: int) -> None:
        del step
        vae = nnx.merge(graph, params)
        moments = np.asarray(nnx.jit(VAE.encode)(vae, to_unit(jnp.asarray(pool["image"][:1024]))))
        vae.config = standardised(vae_config, moments)
        save_part(workdir / "model" / "vae", vae)

    images = {"image": pool["image"]}
    return Task(lambda: start, loss, _batches(config, images), export, pool)


def clip_task(config, source: Source, workdir: Path) -> Task:
    """A small CLIP of its own vocabulary on image-caption pairs (arXiv 2103.00020).

    Its loss compares all examples of a batch, which cannot be taken in parts.
    """
    if config.accumulate > 1:
        raise ValueError("accumulate is 1 for task clip: its loss compares all of a batch")
    captions = [
        text
        for start in range(0, min(len(source), 4096), 64)
        for text in source.batch(np.arange(start, min(start + 64, len(source))))["given"]["caption"]
    ]
    clip = small_clip(captions, image_size=source.size, seed=config.seed)
    encoders = {"ids": lambda images, given: clip.tokenize(given["caption"])}
    pool = prepare(source, (), {}, encoders, workdir / "pool", {"seed": config.seed})

    def loss(params, batch, keys):
        del keys
        return clip.loss(params, batch["image"], batch["ids"])

    def export(params, step: int) -> None:
        del step
        clip.with_params(params).save(workdir / "model" / "clip")

    rows = {"image": pool["image"], "ids": pool["ids"]}
    return Task(lambda: clip.params, loss, _batches(config, rows), export, pool)


def depth_task(config, source: Source, workdir: Path) -> Task:
    """A depth regressor on images whose depth the source knows; it measures samples."""
    pool = prepare(source, ("depth",), {}, {}, workdir / "pool", {})
    model_config, depth = DepthConfig.from_dict(config.model.to_dict()), conditions.get("depth")

    def create() -> DepthRegressor:
        return DepthRegressor(model_config, dtype=config.dtype, rngs=Keys(config.seed))

    graph = nnx.graphdef(nnx.eval_shape(create))

    def loss(params, batch, keys):
        del keys
        wanted = depth.value(batch["stored"]["depth"])["map"][..., 0]
        return depth_loss(nnx.merge(graph, params), to_unit(batch["image"]), wanted)

    def export(params, step: int) -> None:
        del step
        regressor = nnx.merge(graph, params)
        save_part(workdir / "model" / "depth", regressor, "float16")

    rows = _batches(config, pool)
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
    recipe = make_recipe(config, names, clip.sizes, vae.config, _absent(names, tools))
    encode = nnx.jit(lambda vae, images: vae.encode(to_unit(images)))

    def moments(images, given):
        del given
        padded = np.concatenate([images, images[:1].repeat(-len(images) % 64, axis=0)])
        return np.asarray(encode(vae, jnp.asarray(padded)))[: len(images)].astype(np.float16)

    made_by = {"vae": fingerprint(nnx.state(vae)), "clip": fingerprint(clip.params)}
    made_by |= {"tools": config.tools.to_dict()}
    pool = prepare(source, names, tools, {"moments": moments}, workdir / "pool", made_by)

    info = {
        "process": recipe.process.to_dict(),
        "image_size": source.size,
        "sampler": config.sampler.to_dict(),
        "source": source.name,
        "clip_text": clip_text,
    }

    def export(params, step: int) -> None:
        composer = recipe.composer(params)
        parts = workdir / "parts"
        if not parts.is_dir():  # the fixed networks, written once
            with replacing(parts) as new:
                save_part(new / "vae", vae)
                clip.save(new / "clip")
        save_model(workdir / "model", composer, parts, info | {"step": step})

    def tensors(params) -> dict[str, Tensor]:
        every = module_tensors(recipe.composer(params))
        return {name: t for name, t in every.items() if not name.startswith("absent.")}

    rows = _batches(config, pool)
    return Task(recipe.init, recipe.loss, rows, export, pool, recipe.start, tensors)


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
