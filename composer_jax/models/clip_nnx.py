"""CLIP's own network (arXiv 2103.00020), with transformers' module names and numerics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Int

from composer_jax.models.blocks import conv, embed, layer_norm, linear
from composer_jax.models.files import module_tensors
from composer_jax.models.initializers import abstract, zeros
from composer_jax.models.transformer import ACTIVATIONS, TransformerLayer

MAX_LAYERS = 200


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """What the transformers of both towers are made of; fields as in transformers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower. `eos_token_id`: a text is pooled where it stands first."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower, for square images of `num_channels` channels."""

    image_size: int
    patch_size: int
    num_channels: int


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, and the width of the space they share."""

    text: TextConfig
    vision: VisionConfig
    projection_dim: int
    logit_scale_init_value: float

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> CLIPConfig:
        """From transformers' `CLIPConfig.to_dict()`; raises ValueError naming what is no such."""
        own = {"projection_dim": int, "logit_scale_init_value": float}
        return CLIPConfig(
            text=TextConfig(**_tower(TextConfig, values, "text_config")),
            vision=VisionConfig(**_tower(VisionConfig, values, "vision_config")),
            **{name: _checked(values, name, kind, "") for name, kind in own.items()},
        )


def _tower(kind: type, values: Mapping[str, Any], part: str) -> dict[str, Any]:
    types = {"int": int, "float": float, "str": str}
    inner = values.get(part)
    if not isinstance(inner, Mapping):
        raise ValueError(f"config.json: {part} is {inner!r}, not an object")
    fields = {
        field.name: _checked(inner, field.name, types[field.type], f"{part}.")
        for field in dataclasses.fields(kind)
    }
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if width % heads:
        raise ValueError(f"config.json: {part} has {heads} heads of a width of {width} in all")
    if fields["hidden_act"] not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json: {part}.hidden_act {fields['hidden_act']}; it is {allowed}")
    if fields["num_hidden_layers"] > MAX_LAYERS:
        raise ValueError(f"config.json: {part} has more than {MAX_LAYERS} layers")
    if fields.get("num_channels", 3) != 3:
        raise ValueError(f"config.json: {part}.num_channels is {fields['num_channels']}, not 3")
    return fields


def _checked(values: Mapping[str, Any], name: str, kind: type, part: str):
    value = values.get(name)
    allowed = (int, float) if kind is float else kind
    least = 0 if name.endswith("_id") else 1e-12
    right = isinstance(value, allowed) and not isinstance(value, bool)
    if not right or (kind is not str and not least <= value < 2**31):
        wanted = {int: "a positive whole number", float: "a positive number", str: "a text"}[kind]
        raise ValueError(f"config.json: {part}{name} is {value!r}, not {wanted}")
    return value


class TextEmbeddings(nnx.Module):
    """Tokens and their positions."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.token_embedding = embed(config.vocab_size, width, rngs=rngs)
        self.position_embedding = embed(config.max_position_embeddings, width, rngs=rngs)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """ids [B, L]; returns [B, L, D]."""
        places_1xL = jnp.arange(ids.shape[1])[None]
        return self.token_embedding(ids) + self.position_embedding(places_1xL)


class VisionEmbeddings(nnx.Module):
    """A token of the whole image, then its patches, row by row, and all their positions."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size,) * 2
        positions = (config.image_size // config.patch_size) ** 2 + 1
        options = {"strides": patch, "padding": "VALID", "use_bias": False, "rngs": rngs}
        self.class_embedding = nnx.Param(zeros(rngs.params(), (width,)))
        self.patch_embedding = conv(config.num_channels, width, patch, **options)
        self.position_embedding = embed(positions, width, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """pixels [B, h, w, 3], normalised; returns [B, 1 + patches, D]."""
        patches_BxhxwxD = self.patch_embedding(pixels)
        batch, width = pixels.shape[0], patches_BxhxwxD.shape[-1]
        whole_Bx1xD = jnp.broadcast_to(self.class_embedding[...][None, None], (batch, 1, width))
        tokens_BxNxD = jnp.concatenate(
            [whole_Bx1xD, patches_BxhxwxD.reshape(batch, -1, width)], axis=1
        )
        return tokens_BxNxD + self.position_embedding.embedding[...][None]


class Encoder(nnx.Module):
    """A tower's layers."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                TransformerLayer(
                    config.hidden_size,
                    config.intermediate_size,
                    config.num_attention_heads,
                    activation=config.hidden_act,
                    eps=config.layer_norm_eps,
                    dtype=jnp.float32,
                    rngs=rngs,
                )
                for _ in range(config.num_hidden_layers)
            ]
        )

    def __call__(self, x: Float[Array, "b n d"], causal: bool = False) -> list[jax.Array]:
        """x [B, N, D]; returns it and what each layer makes of it, all [B, N, D]."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], causal))
        return states


class TextTower(nnx.Module):
    """A causal transformer over a text, pooled at its end token."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.end = config.eos_token_id
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = _norm(config, rngs)

    def __call__(self, ids: Int[Array, "b l"], skip: int = 0) -> tuple[jax.Array, jax.Array]:
        """ids [B, L]; returns hidden states [B, L, D], without the last `skip` layers, and the
        pooled text [B, D], of all layers; both after the final norm."""
        states = self.encoder(self.embeddings(ids), causal=True)
        # Configs of the first releases say 2 where the end token is the largest of all.
        marks_BxL = ids if self.end == 2 else ids == self.end
        pooled_BxD = states[-1][jnp.arange(ids.shape[0]), jnp.argmax(marks_BxL, axis=-1)]
        return self.final_layer_norm(states[-1 - skip]), self.final_layer_norm(pooled_BxD)


class VisionTower(nnx.Module):
    """A transformer over an image's patches, pooled at the token of the whole."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = _norm(config, rngs)  # the peer's spelling
        self.encoder = Encoder(config, rngs=rngs)
        self.post_layernorm = _norm(config, rngs)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """pixels [B, h, w, 3], normalised; returns [B, D]."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(states[-1][:, 0])


class CLIP(nnx.Module):
    """Both towers, their projections into one space, and the log of the inverse temperature."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.text_model = TextTower(config.text, rngs=rngs)
        self.vision_model = VisionTower(config.vision, rngs=rngs)
        self.text_projection = linear(config.text.hidden_size, config.projection_dim, **options)
        self.visual_projection = linear(config.vision.hidden_size, config.projection_dim, **options)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value))


def abstract_clip(config: CLIPConfig) -> CLIP:
    """The network without its parameters: names and shapes alone."""
    return abstract(CLIP, config)


def random_params(network: CLIP, scale: float, seed: int) -> dict[str, Any]:
    """Parameters to train from, nested, drawn from where transformers' Flax model draws them.

    `scale`: the log of the inverse temperature to start from.
    """
    generator = np.random.default_rng(seed)
    starts = {"scale": 1.0, "bias": 0.0, "logit_scale": scale}
    wider = {"class_embedding", "text_projection", "visual_projection"}
    params = {}
    for name, tensor in module_tensors(network).items():
        path = tuple(name.split("."))
        if path[-1] in starts:
            params[path] = jnp.full(tensor.shape, starts[path[-1]])
        else:
            deviation = 0.01 if wider.isdisjoint(path) else 0.02
            params[path] = jnp.asarray(
                deviation * generator.standard_normal(tensor.shape, np.float32)
            )
    return traverse_util.unflatten_dict(params)


def _norm(config: TowerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
