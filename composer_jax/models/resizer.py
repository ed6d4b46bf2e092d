"""The condition resizer: every spatial condition through its own stem to latent size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.blocks import conv, linear, space_to_depth


class Stem(nnx.Module):
    """Brings a map from image size to latent size: space-to-depth first, then convolutions.

    A strided convolution from one channel is bound by memory and costs ten times as much. A channel
    of ones joins the folded map, so that present-but-blank is seen.
    """

    def __init__(
        self, channels: int, out_channels: int, width: int, factor: int, *, dtype, rngs: nnx.Rngs
    ):
        self.factor = factor
        options = {"kernel": (3, 3), "padding": 1, "dtype": dtype, "rngs": rngs}
        self.conv_in = conv(channels * factor**2 + 1, width, **options)
        self.conv_mid = conv(width, width, **options)
        self.conv_out = conv(width, out_channels, **options)

    def __call__(self, maps: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """maps in [0, 1], [B, H, W, C], H and W multiples of the factor; returns latent size."""
        x_BxhxwxC = space_to_depth(maps, self.factor)
        x_BxhxwxC = jnp.concatenate([x_BxhxwxC, jnp.ones_like(x_BxhxwxC[..., :1])], axis=-1)
        h_BxhxwxD = jax.nn.silu(self.conv_in(x_BxhxwxC))
        h_BxhxwxD = jax.nn.silu(self.conv_mid(h_BxhxwxD))
        return self.conv_out(h_BxhxwxD)


def shrink(maps: Float[Array, "b H W c"], factor: int, out: int) -> Float[Array, "b h w d"]:
    """Maps at latent size without parameters: means over patches, padded with zeros to `out`.

    What a composer without stems sees, for comparison. Raises ValueError where maps have more
    channels than that.
    """
    batch, height, width, channels = maps.shape
    if channels > out:
        raise ValueError(f"local_channels is {out}; a map of {channels} channels needs as many")
    shape = (batch, height // factor, factor, width // factor, factor, channels)
    small = jnp.mean(maps.reshape(shape), axis=(2, 4))
    return jnp.pad(small, ((0, 0), (0, 0), (0, 0), (0, out - channels)))


class VectorProjection(nnx.Module):
    """Projects a vector to the width of the timestep embedding, or to a few context tokens.

    Embeddings of unit length and histograms have tiny numbers, from which a network learns slowly:
    a vector of length `norm` is scaled to unit variance first.
    """

    def __init__(
        self, size: int, norm: float | None, width: int, out: int, *, dtype, rngs: nnx.Rngs
    ):
        self.scale = 1.0 if norm is None else math.sqrt(size) / norm
        self.linear_1 = linear(size, width, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(self, vector: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """vector [B, D]; returns [B, out]."""
        return self.linear_2(jax.nn.silu(self.linear_1(self.scale * vector)))
