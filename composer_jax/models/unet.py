"""The cross-attention UNet, with Stable Diffusion's module names and numerics in diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.conditions.base import meant
from composer_jax.models.blocks import (
    Attention,
    Downsample,
    ResnetBlock,
    Upsample,
    conv1,
    conv3,
    depth_to_space,
    group_norm,
    layer_norm,
    linear,
    space_to_depth,
)
from composer_jax.models.feedforward import FeedForward
from composer_jax.models.initializers import zeros
from composer_jax.models.vae import check_sizes, check_widths, strict

REMAT = ("none", "attention", "blocks")  # what is computed again for the gradient, not kept

Context = list[tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class UNetConfig:
    """A UNet's shape. `heads`: attention heads by level; `attention`: which levels have any.

    `in_channels` counts local condition channels too. `patch` folds latents by space-to-depth
    inside (1 for Stable Diffusion).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    patch: int = 1

    def __post_init__(self):
        check_sizes(self, "in_channels", "out_channels", "cross_attention_dim", "patch")
        check_widths(self)
        levels = len(self.block_out_channels)
        for name, kind in (("attention", bool), ("heads", int)):
            values = getattr(self, name)
            whole = isinstance(values, tuple) and all(type(value) is kind for value in values)
            if not whole or len(values) != levels:
                raise ValueError(f"{name} is {values!r}; one {kind.__name__} a level is wanted")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"block_out_channels {width} is no multiple of {heads} heads")
        if not isinstance(self.use_linear_projection, bool):
            raise ValueError(f"use_linear_projection is {self.use_linear_projection!r}")

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.block_out_channels[0]

    def to_dict(self) -> dict:
        """As JSON's types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> UNetConfig:
        """From `to_dict`'s result; raises ValueError for an unknown key."""
        return cls(**strict(cls, values))


PRESETS = {
    "sd15": UNetConfig(),  # 860 M
    "sd21": UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True),
    "scenes64": UNetConfig(
        in_channels=6 + 32,
        out_channels=6,
        block_out_channels=(160, 160),
        attention=(True, True),
        heads=(5, 5),
        layers_per_block=1,
        cross_attention_dim=128,
        norm_num_groups=16,
    ),
    "tiny": UNetConfig(
        in_channels=6 + 32,
        out_channels=6,
        block_out_channels=(16, 32),
        attention=(False, True),
        heads=(2, 2),
        layers_per_block=1,
        cross_attention_dim=128,
        norm_num_groups=4,
        patch=2,
    ),
}


def timestep_embedding(timesteps: Float[Array, " b"], width: int) -> Float[Array, "b e"]:
    """Sinusoids of timesteps (0 to 1000), cosines first (arXiv 2006.11239, as SD has them)."""
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timesteps.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers around a SiLU."""

    def __init__(self, width: int, out: int, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = linear(width, out, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(out, out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """x [B, D]; returns [B, E]."""
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each normalised and around a skip."""

    def __init__(self, width: int, context: int, heads: int, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layer_norm(width, 1e-5, **options)
        self.attn1 = Attention(width, width, heads, bias=False, **options)
        self.norm2 = layer_norm(width, 1e-5, **options)
        self.attn2 = Attention(width, context, heads, bias=False, **options)
        self.norm3 = layer_norm(width, 1e-5, **options)
        self.ff = FeedForward(width, **options)

    def __call__(self, x: Float[Array, "b n c"], projected, bias) -> Float[Array, "b n c"]:
        """x [B, N, C], projected context (k, v) and logits' bias [B, L]; returns x's shape."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), projected, bias)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """A transformer block over the positions of a map, around a skip; it starts as its skip."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.linear = config.use_linear_projection
        self.norm = group_norm(channels, config.norm_num_groups, 1e-6, **options)
        block = TransformerBlock(channels, config.cross_attention_dim, heads, **options)
        self.transformer_blocks = nnx.List([block])
        if self.linear:
            self.proj_in = linear(channels, channels, **options)
            self.proj_out = linear(channels, channels, kernel_init=zeros, **options)
        else:
            self.proj_in = conv1(channels, channels, **options)
            self.proj_out = conv1(channels, channels, kernel_init=zeros, **options)

    def __call__(self, x: Float[Array, "b h w c"], context: Context, bias):
        """x [B, H, W, C]; takes its (k, v) off the front of `context`; returns x's shape."""
        # apart, or XLA for TPUs turns the gradient into float32 where it only moves it
        h = jax.lax.optimization_barrier(self.norm(x))
        if self.linear:
            h = self.proj_in(h.reshape(x.shape[0], -1, x.shape[3]))
        else:
            h = self.proj_in(h).reshape(x.shape[0], -1, x.shape[3])
        for block in self.transformer_blocks:
            h = block(h, context.pop(0), bias)
        if self.linear:
            return x + self.proj_out(h).reshape(x.shape)
        return x + self.proj_out(h.reshape(x.shape))


def _layer(resnet, transformer, x, embedding, context: Context, bias, remat: str):
    taken = [context.pop(0) for _ in transformer.transformer_blocks] if transformer else []

    def attention(x, taken, bias):
        return transformer(x, list(taken), bias)

    def both(x, embedding, taken, bias):
        x = resnet(x, embedding)
        return inner(x, taken, bias) if transformer else x

    inner = jax.checkpoint(attention) if remat == "attention" else attention
    return (jax.checkpoint(both) if remat == "blocks" else both)(x, embedding, taken, bias)


class Block(nnx.Module):
    """One level, down or up: resnets with attention between them, then a change of resolution."""

    def __init__(self, widths, heads: int | None, resample, config, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        time_width, groups = config.time_embed_dim, config.norm_num_groups
        self.resnets = nnx.List(
            [ResnetBlock(i, o, time_width, groups, 1e-5, **options) for i, o in widths]
        )
        out = widths[-1][1]
        if heads:
            self.attentions = nnx.List([Transformer(out, heads, config, **options) for _ in widths])
        if resample == "down":
            self.downsamplers = nnx.List([Downsample(out, asymmetric=False, **options)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample(out, **options)])

    def layer(self, i: int, x, embedding, context: Context, bias, remat: str = "none"):
        """Resnet i and its attention, which takes its (k, v) off the front of `context`."""
        attention = self.attentions[i] if hasattr(self, "attentions") else None
        return _layer(self.resnets[i], attention, x, embedding, context, bias, remat)


class Middle(nnx.Module):
    """Resnet, attention, resnet."""

    def __init__(self, width: int, heads: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        shape = (width, width, config.time_embed_dim, config.norm_num_groups, 1e-5)
        self.resnets = nnx.List([ResnetBlock(*shape, **options) for _ in range(2)])
        self.attentions = nnx.List([Transformer(width, heads, config, **options)])

    def __call__(self, x: Float[Array, "b h w c"], embedding, context: Context, bias, remat="none"):
        """x [B, H, W, C]; returns the same shape."""
        first, second = self.resnets
        x = _layer(first, self.attentions[0], x, embedding, context, bias, remat)
        return _layer(second, None, x, embedding, context, bias, remat)


class UNet(nnx.Module):
    """eps, v or flow from noisy latents (with local channels), timestep and context.

    `remat`: what a gradient computes again instead of keeping it: nothing, each transformer, or
    each resnet with its transformer. Raises ValueError for another word.
    """

    def __init__(self, config: UNetConfig, *, remat="none", dtype=jnp.float32, rngs: nnx.Rngs):
        if remat not in REMAT:
            raise ValueError(f"remat {remat!r}{meant(remat, REMAT)}; allowed: {', '.join(REMAT)}")
        self.config, self.dtype, self.remat = config, dtype, remat
        options = {"dtype": dtype, "rngs": rngs}
        widths, fold = config.block_out_channels, config.patch**2
        last = len(widths) - 1
        heads = [h if on else None for h, on in zip(config.heads, config.attention, strict=True)]
        self.conv_in = conv3(config.in_channels * fold, widths[0], **options)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_embed_dim, **options)
        skips, down, previous = [widths[0]], [], widths[0]
        for i, width in enumerate(widths):
            pairs = [(previous if j == 0 else width, width) for j in range(config.layers_per_block)]
            resample = "down" if i < last else None
            down.append(Block(pairs, heads[i], resample, config, **options))
            skips += [width] * (config.layers_per_block + (i < last))
            previous = width
        self.down_blocks = nnx.List(down)
        self.mid_block = Middle(widths[-1], config.heads[-1], config, **options)
        up = []
        for i, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(config.layers_per_block + 1):
                pairs.append((previous + skips.pop(), width))
                previous = width
            up.append(Block(pairs, heads[i], "up" if i > 0 else None, config, **options))
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = group_norm(widths[0], config.norm_num_groups, 1e-5, **options)
        self.conv_out = conv3(widths[0], config.out_channels * fold, kernel_init=zeros, **options)

    def _transformers(self) -> list[Transformer]:
        """All transformers in the order of evaluation."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [a for block in blocks for a in getattr(block, "attentions", [])]

    def project_context(self, context: Float[Array, "b l d"]) -> Context:
        """Keys and values of every cross-attention, in order: they do not depend on t."""
        return [
            block.attn2.project(context)
            for transformer in self._transformers()
            for block in transformer.transformer_blocks
        ]

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        context: Float[Array, "b l d"] | Context,
        context_bias: Float[Array, "b l"] | None = None,
        extra_embedding: Float[Array, "b e"] | None = None,
    ) -> Float[Array, "b h w d"]:
        """One evaluation; returns [B, h, w, out_channels].

        x [B, h, w, in_channels]; timesteps 0 to 1000; context tokens, or of `project_context`;
        `context_bias` joins the logits of cross-attention (`MASKED`: not seen); `extra_embedding`
        is added to the timestep embedding.
        """
        projected = context if isinstance(context, list) else self.project_context(context)
        projected = list(projected)
        sinusoids = timestep_embedding(timesteps, self.config.block_out_channels[0])
        embedding = self.time_embedding(sinusoids.astype(self.dtype))
        if extra_embedding is not None:
            embedding = embedding + extra_embedding
        x = self.conv_in(space_to_depth(x, self.config.patch))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, embedding, projected, context_bias, self.remat)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, embedding, projected, context_bias, self.remat)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block.layer(i, x, embedding, projected, context_bias, self.remat)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        x = self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        return depth_to_space(x, self.config.patch)
