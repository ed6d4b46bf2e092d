"""Small frozen networks that measure samples of the built-in world: they see what was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.blocks import (
    Downsample,
    ResnetBlock,
    Upsample,
    conv3,
    depth_to_space,
    group_norm,
    space_to_depth,
)
from composer_jax.models.vae import AttentionBlock, strict

PATCH, EPS = 4, 1e-6


@dataclass(frozen=True)
class DepthConfig:
    """A depth regressor's shape: channels at a quarter and at an eighth of the image's size."""

    widths: tuple[int, int] = (64, 120)
    norm_num_groups: int = 8

    def to_dict(self) -> dict:
        """As JSON's types."""
        return asdict(self) | {"widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: Mapping) -> DepthConfig:
        """From `to_dict`'s result; raises ValueError for an unknown key."""
        return cls(**strict(cls, values))


class Dense(nnx.Module):
    """Numbers for every pixel: two resolutions, attention at the lower, a skip.

    `widths`: channels at a quarter and at an eighth of the image's size.
    """

    def __init__(
        self, widths: tuple[int, int], groups: int, outputs: int, *, dtype, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "rngs": rngs}
        high, low = widths
        self.conv_in = conv3(3 * PATCH**2, high, **options)
        self.down = ResnetBlock(high, high, None, groups, EPS, **options)
        self.downsample = Downsample(high, asymmetric=False, **options)
        self.middle_in = ResnetBlock(high, low, None, groups, EPS, **options)
        self.attention = AttentionBlock(low, groups, **options)
        self.middle_out = ResnetBlock(low, low, None, groups, EPS, **options)
        self.upsample = Upsample(low, **options)
        self.up = ResnetBlock(low + high, high, None, groups, EPS, **options)
        self.norm_out = group_norm(high, groups, EPS, **options)
        self.conv_out = conv3(high, outputs * PATCH**2, **options)

    def dense(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W c"]:
        """images [B, H, W, 3] in [-1, 1], H and W multiples of 8; returns [B, H, W, outputs]."""
        high_BxhxwxC = self.down(self.conv_in(space_to_depth(images, PATCH)))
        low_BxhxwxD = self.attention(self.middle_in(self.downsample(high_BxhxwxC)))
        up_BxhxwxD = self.upsample(self.middle_out(low_BxhxwxD))
        x_BxhxwxC = self.up(jnp.concatenate([up_BxhxwxD, high_BxhxwxC], axis=-1))
        x_BxhxwxP = self.conv_out(jax.nn.silu(self.norm_out(x_BxhxwxC)))
        return depth_to_space(x_BxhxwxP, PATCH).astype(jnp.float32)


class DepthRegressor(Dense):
    """Relative inverse depth from an image."""

    def __init__(self, config: DepthConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        super().__init__(config.widths, config.norm_num_groups, 1, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W"]:
        """images [B, H, W, 3] in [-1, 1], H and W multiples of 8; returns about [0, 1], near 1."""
        return self.dense(images)[..., 0]

    def tool(self):
        """The depth network that the condition `depth` takes: uint8 [B, H, W, 3] to [B, H, W]."""
        graph, state = nnx.split(self)
        run = jax.jit(lambda state, images: nnx.merge(graph, state)(images / 127.5 - 1.0))
        return lambda images: np.asarray(run(state, jnp.asarray(images, jnp.float32)))


def depth_loss(
    regressor: DepthRegressor, images: Float[Array, "b H W 3"], depth: Float[Array, "b H W"]
) -> tuple[jax.Array, dict]:
    """L1 of relative inverse depth in [0, 1], and of its differences.

    Returns the loss and metrics of each image, [B].
    """
    error = regressor(images) - depth
    each = partial(jnp.mean, axis=(1, 2))
    edges = sum(each(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
    l1 = each(jnp.abs(error))
    return l1 + edges, {"l1": l1}
