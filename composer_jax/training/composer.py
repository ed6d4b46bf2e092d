"""Training a composer: the loss, and all that a step needs besides its data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax import conditions
from composer_jax.diffusion.process import BETAS, MEANING, Process
from composer_jax.models.composer import Composer, ComposerConfig, Constant, silence
from composer_jax.models.files import Tensor
from composer_jax.models.initializers import described, drawn
from composer_jax.models.pretrained import left_out, open_unet
from composer_jax.models.unet import UNetConfig
from composer_jax.models.vae import VAEConfig
from composer_jax.storage.models import find_model
from composer_jax.training.step import Loss
from composer_jax.training.warm_start import around, going_on, start_from

log = logging.getLogger("composer_jax")


@dataclass(frozen=True)
class Recipe:
    """How a composer is trained: `params`, `Tensor`s not read yet, are what it starts from, the
    network's that it is built around among them; `constants` are not trained; `loss` is the step's;
    `composer(params)` puts parameters into a composer.
    """

    config: ComposerConfig
    process: Process
    params: Any
    constants: Any
    loss: Loss
    composer: Callable[[Any], Composer]


def make_recipe(
    config, names: Sequence[str], sizes: Mapping[str, int], codec: VAEConfig, absent: Mapping
) -> Recipe:
    """The recipe of an experiment's config for conditions `names`.

    `sizes`: what CLIP decides; `absent`: values of the conditions whose absence is encoded. Reads
    no weights. Raises ValueError where parts do not fit together.
    """
    composer_config = ComposerConfig(
        unet=UNetConfig.from_dict(config.model.unet.to_dict()),
        conditions=tuple(names),
        sizes=sizes,
        latent_channels=codec.latent_channels,
        factor=codec.factor,
        **{key: value for key, value in config.model.items() if key != "unet"},
    )
    if config.image_size % composer_config.multiple:
        raise ValueError(
            f"config key image_size is {config.image_size}; a multiple of "
            f"{composer_config.multiple} is wanted: of the codec's {codec.factor} x "
            f"model.unet.patch, {composer_config.unet.patch}, x 2 for every level after the first"
        )
    process, start, fresh = _start(config, composer_config)
    dtype = jnp.dtype(config.dtype)

    options = {"remat": config.get("remat", "none"), "dtype": dtype}
    network = described(Composer, composer_config, absent, **options)
    for name in fresh:
        silence(network, name)
    graph = nnx.graphdef(network)
    constants = jax.device_get(nnx.state(network, Constant))
    params = start_from(drawn(nnx.state(network, nnx.Param), config.seed), start)
    keep = np.asarray([chance_of(config, name) for name in names], np.float32)
    for name, value in config.get("keep_each", {}).items():
        if value is not None and name not in names:
            log.warning("keep_each.%s is without effect: %s is not trained", name, name)
    draw = partial(draw_presence, keep=keep, drop_all=config.drop_all, keep_all=config.keep_all)

    def composer_of(params) -> Composer:
        return nnx.merge(graph, params, constants)

    def loss(params, batch, keys):
        return composer_loss(composer_of(params), codec, process, batch, keys, draw)

    return Recipe(composer_config, process, params, constants, loss, composer_of)


def chance_of(config, name: str) -> float:
    """How often a condition is given in training: its own chance, or `keep`, or where it is a map
    `keep_maps`, or what `keep_each` says of it; the last of these that is not None."""
    condition = conditions.get(name)
    chance = condition.keep_probability
    asked = {"keep": config.get("keep")}
    if condition.spatial:
        asked["keep_maps"] = config.get("keep_maps")
    asked[f"keep_each.{name}"] = config.get("keep_each", {}).get(name)
    for key, value in asked.items():
        if value is not None:
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{key} is {value}; a number from 0 to 1, or None, is wanted")
            chance = value
    return chance


def check_start(config) -> None:
    """Raises ValueError where `config.init_from` is no UNet or composer that can be started from,
    before anything costly is done; says what of its source is left out."""
    if config.init_from and not find_model(config.init_from):
        open_unet(config.init_from)
        source = Path(config.init_from)
        if source.exists() and (rest := left_out(source)):
            log.info("init_from takes the UNet of %s; left out: %s", source, rest)


def _start(
    config, composer_config: ComposerConfig
) -> tuple[Process, dict[str, Tensor], Sequence[str]]:
    """The process, the weights that `config.init_from` names, {} for none, and the conditions that
    they do not know, which start silent.

    Betas that the config does not say are those of the start. Raises ValueError where it and the
    config ask for different things; what is but assumed of a single file is no such thing.
    """
    asked = config.process.to_dict()
    if not config.init_from:
        return Process.from_dict(asked), {}, ()
    if folder := find_model(config.init_from):
        tensors, trained, known = going_on(folder, composer_config)
    else:
        unet = open_unet(config.init_from)
        trained = {} if unet.assumed else unet.process
        tensors, known = around(unet, composer_config), ()
    if asked.get("schedule") == trained.get("schedule") == "sd":
        asked = {key: trained[key] for key in BETAS if key in trained} | asked
    process = Process.from_dict(asked)
    before = Process.from_dict(trained) if trained else process
    for key in MEANING:
        now, was = getattr(process, key), getattr(before, key)
        if now != was and not config.init_any_process:
            raise ValueError(
                f"process.{key} is {now!r}; {config.init_from} was trained with {was!r}; to teach "
                f"it the other, set init_any_process=True"
            )
    fresh = [name for name in composer_config.conditions if name not in known]
    return process, tensors, fresh


def composer_loss(
    composer: Composer,
    codec: VAEConfig,
    process: Process,
    batch: Mapping[str, Any],
    keys: jax.Array,
    draw_presence: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, dict]:
    """Weighted squared error of the network's output; each example draws everything for itself.

    `batch`: image uint8 [B, H, W, 3], moments [B, h, w, 2 c] and the cached conditions' `stored`.
    `draw_presence(key)` gives one example's presence [n]. Returns losses and metrics [B].
    """
    names = composer.config.conditions
    known = {name: conditions.get(name) for name in names}
    images = batch["image"].astype(jnp.float32) / 255.0

    def draw(key, image, moments, stored):
        keys = jax.random.split(key, 4 + len(names))
        latent = codec.latents(moments[None].astype(jnp.float32), keys[0])[0]
        eps = jax.random.normal(keys[1], latent.shape)
        t = process.sample_times(keys[2], ())
        values = {
            name: known[name].draw(keys[4 + i], stored.get(known[name].draws_from or name), image)
            for i, name in enumerate(names)
        }
        return latent, eps, t, draw_presence(keys[3]), values

    x0, eps, t, presence, values = jax.vmap(draw)(keys, images, batch["moments"], batch["stored"])
    # drawn as they are: else XLA for TPUs folds every mask that a map is chosen by, not the map
    values = jax.lax.optimization_barrier(values)
    t_Bx1x1x1 = t[:, None, None, None]
    x_t = process.diffuse(x0, eps, t_Bx1x1x1)
    encoded, absent = composer.encode(values), composer.encode_absent()
    output = composer(x_t, process.timestep(t), encoded, absent, presence)
    error = jnp.mean((output - process.target(x0, eps, t_Bx1x1x1)) ** 2, axis=(1, 2, 3))
    return process.loss_weight(t) * error, {"mse": error}


def draw_presence(key: jax.Array, keep: jax.Array, drop_all: float, keep_all: float) -> jax.Array:
    """Which conditions one example is given, float32 [n] of 0 and 1 (arXiv 2302.09778, 2.2).

    With probability `drop_all` none, with `keep_all` all, else each by its own `keep` [n].
    """
    key_all, key_each = jax.random.split(key)
    u = jax.random.uniform(key_all)
    each = jax.random.bernoulli(key_each, keep).astype(jnp.float32)
    every = jnp.where(u < drop_all, 0.0, jnp.where(u < drop_all + keep_all, 1.0, -1.0))
    return jnp.where(every < 0.0, each, jnp.broadcast_to(every, each.shape))
