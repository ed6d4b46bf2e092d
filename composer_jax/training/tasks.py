"""What the loop trains: codec, CLIP, detectors, composer; each with its loss and batches."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax import conditions
from composer_jax.data.captions import altered
from composer_jax.data.extractors import load_extractors
from composer_jax.data.order import ORDER
from composer_jax.data.pipeline import batches
from composer_jax.data.prepare import Encoders, fingerprint, prepare
from composer_jax.data.scenes import EXCLUSIVE, Scenes
from composer_jax.data.sources import Source, open_source
from composer_jax.data.stream import Caches, is_cache
from composer_jax.models.clip import small_clip
from composer_jax.models.detectors import DepthConfig, DepthRegressor, depth_loss
from composer_jax.models.files import Tensor, module_tensors
from composer_jax.models.initializers import described, drawn
from composer_jax.models.objects import ObjectConfig, ObjectDetector, object_loss
from composer_jax.models.vae import VAE, VAEConfig, codec_loss, pca_skip, standardised
from composer_jax.storage.checkpoints import newest_notes
from composer_jax.storage.models import save_model, save_part
from composer_jax.training.cluster import share
from composer_jax.training.composer import check_start, make_recipe
from composer_jax.training.sharding import make_mesh
from composer_jax.training.step import Loss
from composer_jax.utils.owned import replaced_folder

log = logging.getLogger("composer_jax")


@dataclass(frozen=True)
class Data:
    """`batch(step)`: this process's part of a batch. `pool`: examples that a task looks at.

    `shown`: examples that a person looks at, not trained on where any are held out. `held_out(i)`:
    its part of batch i of these, of which there are `held_out_count`.
    """

    pool: Mapping[str, Any]
    batch: Callable[[int], Any]
    shown: Mapping[str, Any]
    held_out: Callable[[int], Any] | None = None
    held_out_count: int = 0


@dataclass(frozen=True)
class Task:
    """`params`, arrays or `Tensor`s not read yet, learn from `data`.

    `export(params, step)` writes `workdir/model`; `tensors(params)`: a composer's trained tensors
    by name; `about`: what the loss depends on beside the config, as JSON's types.
    """

    params: Any
    loss: Loss
    data: Data
    export: Callable[[Any, int], None]
    tensors: Callable[[Any], dict[str, Tensor]] | None = None
    about: Any = None


def open_data(text: str, config, split: str = "train") -> Source | Caches:
    """The source or the caches of that name, for a config; raises ValueError, one line."""
    if is_cache(text):
        return Caches(text, size=config.image_size)
    return open_source(text, size=config.image_size, seed=config.seed, split=split)


def make_task(config, source: Source | Caches, workdir: Path) -> Task:
    """The task that `config.task` names, on a source. Raises ValueError for an unknown one."""
    tasks = {
        "codec": codec_task,
        "clip": clip_task,
        "depth": depth_task,
        "objects": objects_task,
        "composer": composer_task,
    }
    if config.task not in tasks:
        raise ValueError(f"task {config.task!r}; allowed: {', '.join(tasks)}")
    return tasks[config.task](config, source, workdir)


def _data(
    config,
    source: Source | Caches,
    workdir: Path,
    take: Callable[[Mapping], dict],
    names: Sequence[str] = (),
    tools: Mapping[str, Any] = {},
    encoders: Encoders = {},  # noqa: B006
    made_by: Mapping[str, Any] = {},
    shown: int = 8,
) -> Data:
    """Batches of `source` and `config.held_out`; the pool is all of a source, `shown` of a cache.

    `take`: what of an example goes into a batch.
    """
    part = share(make_mesh(**config.mesh), config.batch)
    kept = newest_notes(workdir / "checkpoints")  # a run keeps the order that it began with
    order = ORDER if kept is None else kept.get("order", 1)

    def opened(source: Source | Caches) -> tuple[dict, Callable[[int], Any], int]:
        """The first examples, batches, and how many examples there are."""
        if isinstance(source, Caches):
            source.check(names, made_by)
            read = source.batches(config.batch, config.seed, part, order)
            pool = source.examples(range(min(shown, len(source))))
            return pool, lambda step: take(read(step)), len(source)
        pool = prepare(source, names, tools, encoders, pools_folder(config, workdir), made_by)
        rows = batches(take(pool), config.batch, config.seed, part)
        return pool, rows, len(pool["image"])

    held_out = open_data(config.held_out, config, split="test") if config.held_out else None
    if config.held_out == config.source and not isinstance(held_out, Scenes):
        raise ValueError(f"held_out is the source itself, {config.source}; another is wanted")
    pool, rows, _ = opened(source)
    if held_out is None:
        return Data(pool, rows, shown=pool)
    return Data(pool, rows, *opened(held_out))


def pools_folder(config, workdir: Path) -> Path:
    """Where sources taken apart are kept. Raises ValueError where that is a file."""
    folder = Path(config.pools) if config.pools else workdir / "pools"
    if folder.is_file():
        raise ValueError(f"pools {folder} is a file; a folder is wanted")
    return folder


def _stored(names: Sequence[str], *more: str) -> Callable[[Mapping], dict]:
    """A function that takes the image, `more`, and what is stored of conditions out of a tree."""
    cached = [name for name in names if conditions.get(name).cached]

    def take(tree: Mapping) -> dict:
        stored = {name: tree["stored"][name] for name in cached}
        return {**{key: tree[key] for key in ("image", *more)}, "stored": stored}

    return take


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def codec_task(config, source: Source | Caches, workdir: Path) -> Task:
    """An autoencoder on images alone; exports it standardised by its own latents."""
    take = lambda tree: {"image": tree["image"]}  # noqa: E731
    data = _data(config, source, workdir, take, shown=1024)
    pool = data.pool
    vae_config = VAEConfig.from_dict(config.model.to_dict())
    dtype = jnp.dtype(config.dtype)

    network = described(VAE, vae_config, dtype=dtype)
    if vae_config.linear_skip:
        pca_skip(network, to_unit(jnp.asarray(pool["image"][:512])))
    graph, start = nnx.split(network)

    def loss(params, batch, keys):
        images = to_unit(batch["image"])
        vae = nnx.merge(graph, params)
        weights = config.kl_weight, config.edge_weight
        return codec_loss(vae, images, keys, *weights, config.get("norm", "l2"))

    def export(params, step: int) -> None:
        del step
        vae = nnx.merge(graph, params)
        moments = np.asarray(nnx.jit(VAE.encode)(vae, to_unit(jnp.asarray(pool["image"][:1024]))))
        vae.config = standardised(vae_config, moments)
        save_part(workdir / "model" / "vae", vae)

    return Task(drawn(start, config.seed), loss, data, export)


def clip_task(config, source: Source | Caches, workdir: Path) -> Task:
    """A small CLIP of its own vocabulary on image-caption pairs (arXiv 2103.00020).

    Each caption comes with `config.altered` false ones (arXiv 2210.01936). Its loss compares all
    examples of a batch, which cannot be taken in parts.
    """
    if config.accumulate > 1:
        raise ValueError("accumulate is 1 for task clip: its loss compares all of a batch")
    if config.dtype != "float32":
        raise ValueError(f"dtype is float32 for task clip, not {config.dtype!r}")
    if isinstance(source, Caches):
        raise ValueError("task clip trains from scenes or images with captions, not from a cache")
    captions = [
        text
        for start in range(0, min(len(source), 4096), 64)
        for text in source.batch(np.arange(start, min(start + 64, len(source))))["given"]["caption"]
    ]
    clip = small_clip(captions, image_size=source.size, seed=config.seed)

    def false_ids(images, given) -> np.ndarray:
        """int32 [B, N, L]; decided by the text alone."""
        del images
        texts = given["caption"]
        rngs = [np.random.default_rng(zlib.crc32(text.encode())) for text in texts]
        false = [
            altered(text, EXCLUSIVE, rng)
            for text, rng in zip(texts, rngs, strict=True)
            for _ in range(config.altered)
        ]
        ids = clip.tokenize(false)
        return ids.reshape(len(texts), config.altered, ids.shape[-1])

    encoders = {"ids": lambda images, given: clip.tokenize(given["caption"]), "false": false_ids}
    take = lambda tree: {key: tree[key] for key in ("image", "ids", "false")}  # noqa: E731
    made_by = {"seed": config.seed, "altered": config.altered}
    data = _data(config, source, workdir, take, encoders=encoders, made_by=made_by)
    clip.report_cut()

    def loss(params, batch, keys):
        del keys
        false_NxL = batch["false"].reshape(-1, batch["ids"].shape[-1])
        return clip.loss(params, batch["image"], jnp.concatenate([batch["ids"], false_NxL]))

    def export(params, step: int) -> None:
        del step
        clip.with_params(params).save(workdir / "model" / "clip")

    return Task(clip.params, loss, data, export)


def depth_task(config, source: Source | Caches, workdir: Path) -> Task:
    """A depth regressor on images whose depth the source knows; it measures samples."""
    data = _data(config, source, workdir, _stored(("depth",)), ("depth",))
    model_config, depth = DepthConfig.from_dict(config.model.to_dict()), conditions.get("depth")

    graph, start = nnx.split(described(DepthRegressor, model_config, dtype=config.dtype))

    def loss(params, batch, keys):
        del keys
        wanted = depth.value(batch["stored"]["depth"])["map"][..., 0]
        return depth_loss(nnx.merge(graph, params), to_unit(batch["image"]), wanted)

    def export(params, step: int) -> None:
        del step
        regressor = nnx.merge(graph, params)
        save_part(workdir / "model" / "depth", regressor, "float16")

    return Task(drawn(start, config.seed), loss, data, export)


def objects_task(config, source: Source | Caches, workdir: Path) -> Task:
    """A detector of the built-in world's objects; it measures samples."""
    if not isinstance(source, Scenes):
        raise ValueError(f"task objects trains from scenes, which know them, not {config.source}")
    encoders = {
        "ids": lambda images, given: given["instances"].astype(np.uint8),
        "objects": lambda images, given: given["objects"],
    }
    take = lambda tree: {key: tree[key] for key in ("image", "ids", "objects")}  # noqa: E731
    made_by = {"seed": config.seed}
    data = _data(config, source, workdir, take, encoders=encoders, made_by=made_by)
    model_config = ObjectConfig.from_dict(config.model.to_dict())

    graph, start = nnx.split(described(ObjectDetector, model_config, dtype=config.dtype))

    def loss(params, batch, keys):
        detector, images = nnx.merge(graph, params), to_unit(batch["image"])
        return object_loss(detector, images, batch["ids"], batch["objects"], keys)

    def export(params, step: int) -> None:
        del step
        save_part(workdir / "model" / "objects", nnx.merge(graph, params), "float16")

    return Task(drawn(start, config.seed), loss, data, export)


def composer_task(config, source: Source | Caches, workdir: Path) -> Task:
    """The composer on latents of a fixed codec and embeddings of a fixed CLIP."""
    check_start(config)
    extractors = load_extractors(config)
    vae, clip, tools = extractors.vae, extractors.clip, extractors.tools
    pools = pools_folder(config, workdir)
    names = extractors.conditions(config.conditions, source, pools)
    absent = extractors.absent(names, pools)
    recipe = make_recipe(config, names, clip.sizes, vae.config, absent)
    made_by, encoders = extractors.made_by, extractors.encoders
    take = _stored(names, "moments")
    data = _data(config, source, workdir, take, names, tools, encoders, made_by)
    clip.report_cut()
    if isinstance(source, Caches):
        source.check_tokens(clip.tokenize)
        clip.cut.clear()

    info = {
        "process": recipe.process.to_dict(),
        "image_size": source.size,
        "sampler": config.sampler.to_dict(),
        "source": source.name,
        "clip_text": dict(extractors.clip_text),
    }

    def export(params, step: int) -> None:
        composer = recipe.composer(params)
        parts = workdir / "parts"
        if not parts.is_dir():  # the fixed networks, written once
            with replaced_folder(parts, keep=True) as new:
                save_part(new / "vae", vae)
                clip.save(new / "clip")
        save_model(workdir / "model", composer, parts, info | {"step": step})

    def tensors(params) -> dict[str, Tensor]:
        every = module_tensors(recipe.composer(params))
        return {name: t for name, t in every.items() if not name.startswith("absent.")}

    about = [fingerprint(recipe.constants), conditions.fingerprint(names)]
    return Task(recipe.params, recipe.loss, data, export, tensors, about)
