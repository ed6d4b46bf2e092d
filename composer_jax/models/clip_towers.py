"""A CLIP network as pure functions of its parameters: transformers' Flax model, or our own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from composer_jax.models.clip_nnx import CLIP


class Towers(NamedTuple):
    """Both towers. `params`: nested dicts in the layout of transformers' Flax model.

    `backend`: "flax" or "nnx". `text(params, ids [B, L])` gives hidden states [B, L, D] and
    embeddings [B, E], `image(params, pixels [B, h, w, 3])` embeddings [B, E]; of any length.
    """

    backend: str
    text: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    image: Callable[[Any, jax.Array], jax.Array]


def nnx_towers(network: CLIP, skip: int) -> Towers:
    """The towers of our network; hidden states leave out the text tower's last `skip` layers."""
    graph = nnx.graphdef(network)

    def text(params, ids):
        clip = nnx.merge(graph, nnx.restore_int_paths(params))
        tokens_BxLxD, pooled_BxD = clip.text_model(ids, skip)
        return tokens_BxLxD, clip.text_projection(pooled_BxD)

    def image(params, pixels):
        clip = nnx.merge(graph, nnx.restore_int_paths(params))
        return clip.visual_projection(clip.vision_model(pixels))

    return Towers("nnx", text, image)


def flax_towers(module, skip: int) -> Towers:
    """The same of a `FlaxCLIPModule`."""

    def apply(params, inputs, method):
        with jax.numpy_rank_promotion("allow"):
            return module.apply({"params": params}, inputs, method=method)

    # No attention mask, as in Stable Diffusion: attention is causal, so that what comes after the
    # end token never reaches it, and the vector is the same with a mask and without.
    def text(module, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        out = module.text_model(ids, jnp.ones_like(ids), positions, output_hidden_states=skip > 0)
        tokens = out.last_hidden_state
        if skip:
            tokens = module.text_model.final_layer_norm(out.hidden_states[-1 - skip])
        return tokens, module.text_projection(out.pooler_output)

    def image(module, pixels):
        return module.visual_projection(module.vision_model(pixels).pooler_output)

    return Towers("flax", partial(apply, method=text), partial(apply, method=image))


def encode_text(towers: Towers, params, ids_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, L, D] and embeddings [B, E] of unit length of token ids [B, L]."""
    tokens_BxLxD, vector_BxE = towers.text(params, ids_BxL)
    return tokens_BxLxD, _unit(vector_BxE)


def encode_image(towers: Towers, pixels, params, images_BxHxWx3: jax.Array) -> jax.Array:
    """Embeddings [B, E] of unit length of images that `pixels` normalises."""
    return _unit(towers.image(params, pixels(images_BxHxWx3)))


def _unit(vector_BxE: jax.Array) -> jax.Array:
    length_Bx1 = jnp.linalg.norm(vector_BxE, axis=-1, keepdims=True)
    return vector_BxE / jnp.maximum(length_Bx1, 1e-12)
