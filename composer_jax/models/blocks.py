"""The pieces that VAE and UNet share, with the module names and numerics of diffusers."""

from __future__ import annotations

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.convolution import convolve, convolve_doubled
from composer_jax.models.initializers import embedding_normal, lecun_normal, ones, zeros
from composer_jax.models.mesh import scattered, split

START = {"kernel_init": lecun_normal, "bias_init": zeros}
# E[x^2] - E[x]^2, the default, loses the variance where the mean is large beside the deviation
NORM = {"scale_init": ones, "bias_init": zeros, "use_fast_variance": False}
MASKED = -1e9  # what a token that must not be seen gets in its attention logits; finite, no NaN


def default_dtype() -> type:
    """What networks run in where nobody says: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def space_to_depth(x: Float[Array, "b H W c"], factor: int) -> Float[Array, "b h w d"]:
    """Folds f x f pixels into channels: [B, H, W, C] to [B, H/f, W/f, f f C], f the factor."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // factor, factor, width // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // factor, width // factor, -1)


def depth_to_space(x: Float[Array, "b h w d"], factor: int) -> Float[Array, "b H W c"]:
    """The inverse of `space_to_depth`."""
    b, h, w, d = x.shape
    x = x.reshape(b, h, w, factor, factor, d // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, -1)


def conv(c_in: int, c_out: int, kernel: tuple[int, int], **options) -> nnx.Conv:
    """A convolution; `options` are `nnx.Conv`'s."""
    return nnx.Conv(c_in, c_out, kernel, **START | options)


def conv3(c_in: int, c_out: int, *, stride: int = 1, padding=1, **options) -> nnx.Conv:
    """A 3 x 3 convolution; `options` are `nnx.Conv`'s."""
    options = {"conv_general_dilated": convolve} | options
    return conv(c_in, c_out, (3, 3), strides=stride, padding=padding, **options)


@jax.named_scope("linear")
def matmul(x, kernel, *_, precision=None, **__) -> jax.Array:
    """x [..., C] times a kernel [C, D], or that of a 1 x 1 convolution: [..., D]."""
    # XLA's CPU backend computes a kernel's gradient up to five times slower where x has more than
    # two axes, or where the product is written as a 1 x 1 convolution. On TPUs a flat x costs
    # copies: its layout cannot be the one that the attention's kernel wants.
    kernel = kernel.reshape(kernel.shape[-2:])
    if x.dtype != jnp.float32:
        over_channels = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, kernel, over_channels, precision=precision)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return jax.lax.dot(rows, kernel, precision=precision).reshape(*x.shape[:-1], kernel.shape[1])


def linear(c_in: int, c_out: int, **options) -> nnx.Linear:
    """A linear layer over the last axis; `options` are `nnx.Linear`'s."""
    return nnx.Linear(c_in, c_out, **START | {"dot_general": matmul} | options)


def conv1(c_in: int, c_out: int, **options) -> nnx.Conv:
    """A 1 x 1 convolution; `options` are `nnx.Conv`'s."""
    return conv(c_in, c_out, (1, 1), conv_general_dilated=matmul, **options)


def group_norm(channels: int, groups: int, eps: float, *, dtype, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm over channels-last arrays."""
    options = {"num_groups": groups, "epsilon": eps, "dtype": dtype, "rngs": rngs}
    return nnx.GroupNorm(channels, **NORM, **options)


def layer_norm(width: int, eps: float, *, dtype=None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis."""
    return nnx.LayerNorm(width, epsilon=eps, **NORM, dtype=dtype, rngs=rngs)


def embed(count: int, width: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `count` vectors."""
    return nnx.Embed(count, width, embedding_init=embedding_normal, rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two normalised convolutions around a skip; the timestep embedding is added in between.

    It starts as its skip: the second convolution's kernel is 0.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        time_width: int | None,
        groups: int,
        eps: float,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = group_norm(c_in, groups, eps, **options)
        self.conv1 = conv3(c_in, c_out, **options)
        if time_width is not None:
            self.time_emb_proj = linear(time_width, c_out, **options)
        self.norm2 = group_norm(c_out, groups, eps, **options)
        self.conv2 = conv3(c_out, c_out, kernel_init=zeros, **options)
        if c_in != c_out:
            self.conv_shortcut = conv1(c_in, c_out, **options)

    def __call__(self, x: Float[Array, "b h w c"], embedding=None) -> Float[Array, "b h w d"]:
        """x [B, H, W, C_in], embedding [B, E] or None; returns [B, H, W, C_out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.time_emb_proj(jax.nn.silu(embedding))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nnx.Module):
    """Halves height and width. `asymmetric`: pads below and right only, as the VAE does."""

    def __init__(self, channels: int, *, asymmetric: bool, dtype, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1)) if asymmetric else 1
        self.conv = conv3(channels, channels, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """x [B, H, W, C]; returns [B, H/2, W/2, C]."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by nearest neighbour, then a convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        options = {"conv_general_dilated": convolve_doubled, "dtype": dtype, "rngs": rngs}
        self.conv = conv3(channels, channels, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """x [B, H, W, C]; returns [B, 2H, 2W, C]."""
        return self.conv(x)


def _attend_on_cpu(q, k, v, bias) -> jax.Array:
    """Of [B, N, H, D] and [B, L, H, D], the logits' bias [B, H, 1 or N, L].

    Divides by the sum after the product with v, and takes long sequences head by head, so that a
    head's logits stay in the cache: from 1024 positions on, jax's own takes 2 to 5 times as long.
    """

    def over_positions(q, k, v, bias):
        logits = q @ k.swapaxes(-1, -2) + bias
        weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        return (weight @ v) / weight.sum(-1, keepdims=True)

    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    if q.shape[2] * k.shape[2] < 512 * 512:
        return over_positions(q, k, v, bias).swapaxes(1, 2)
    heads = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, bias)]
    return jax.lax.map(lambda head: over_positions(*head), heads).reshape(q.shape).swapaxes(1, 2)


def bias_as_feature(q, k, v, bias: Float[Array, "b l"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v [B, N or L, H, D + 8] whose logits, divided by sqrt(D), have the bias in them.

    Eight features more, as D stays a multiple of 8: 1 in q; in k the bias, then seven times 0.
    """
    bias_BxLx1 = (bias * math.sqrt(q.shape[-1])).astype(k.dtype)[:, :, None]
    rest = ((0, 0), (0, 0), (0, 0), (0, 8))
    more_BxLxHx8 = jnp.zeros((*k.shape[:3], 8), k.dtype).at[..., 0].set(bias_BxLx1)
    return (
        jnp.pad(q, rest, constant_values=1),
        jnp.concatenate([k, more_BxLxHx8], -1),
        jnp.pad(v, rest),
    )


def _attend_by_cudnn(q, k, v, bias, causal: bool) -> jax.Array:
    """Of [B, N, H, D] and [B, L, H, D], the logits' bias [B, L] or None.

    cuDNN takes a bias only as [.., N, L], and writes a gradient of that size.
    """
    width = q.shape[-1]
    if bias is not None:
        q, k, v = bias_as_feature(q, k, v, bias)
    options = {"scale": width**-0.5, "is_causal": causal, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, **options)[..., :width]


@functools.cache
def _cudnn_takes(width: int, dtype, biased: bool) -> bool:
    """Whether jax has cuDNN here, and that takes heads of this width, on GPUs that know how to."""
    for device in jax.devices():
        if "NVIDIA" in device.device_kind and float(device.compute_capability) < 8.0:
            return False  # before Ampere
    x = jax.ShapeDtypeStruct((1, 8, 1, width), dtype)
    bias = jax.ShapeDtypeStruct((1, 8), jnp.float32) if biased else None
    try:
        jax.eval_shape(partial(_attend_by_cudnn, causal=False), x, x, x, bias)
    except RuntimeError:  # no cuDNN, or not for such heads
        return False
    return True


@jax.named_scope("attention")
def attend(
    q, k, v, heads: int, bias: Float[Array, "b l"] | None = None, causal: bool = False
) -> Float[Array, "b n c"]:
    """Softmax attention of q [B, N, C] over k, v [B, L, C]; `bias` [B, L] joins the logits.

    `causal`: a position sees itself and those before it.
    """
    batch, n, channels = q.shape
    shape = (batch, -1, heads, channels // heads)

    def plain(q, k, v, bias=None):
        if bias is not None:
            bias = bias[:, None, None, :].astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal)

    def on_cpu(q, k, v, bias=None):
        length = k.shape[1]
        every = jnp.zeros((batch, heads, 1, length), q.dtype)
        if bias is not None:
            every = every + bias[:, None, None, :]
        if causal:
            every = every + jnp.where(jnp.tri(n, length, dtype=bool), 0.0, MASKED)[None, None]
        return _attend_on_cpu(q, k, v, every)

    def on_cuda(q, k, v, bias=None):
        return _attend_by_cudnn(q, k, v, bias, causal)

    platforms = {}
    if q.dtype == jnp.float32:
        platforms["cpu"] = on_cpu
    elif _cudnn_takes(shape[-1], q.dtype, bias is not None):
        platforms["cuda"] = on_cuda
    if q.dtype == jnp.bfloat16 and not causal:
        from composer_jax.models import fused  # Pallas takes its time to be imported

        if fused.pays(n, k.shape[1]) and (kernel := split(fused.attention, batch, heads)):
            platforms["tpu"] = kernel
    inputs = [x.reshape(shape) for x in (q, k, v)] + ([] if bias is None else [bias])
    out = jax.lax.platform_dependent(*inputs, **platforms, default=plain)
    return out.reshape(batch, n, channels)


class Attention(nnx.Module):
    """Multi-head attention of a sequence over itself or over a context."""

    def __init__(
        self, channels: int, context: int, heads: int, *, bias: bool, dtype, rngs: nnx.Rngs
    ):
        self.heads = heads
        options = {"dtype": dtype, "rngs": rngs}
        self.to_q = linear(channels, channels, use_bias=bias, **options)
        self.to_k = linear(context, channels, use_bias=bias, **options)
        self.to_v = linear(context, channels, use_bias=bias, **options)
        self.to_out = nnx.List([linear(channels, channels, **options)])

    def project(self, context: Float[Array, "b l d"]) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, L, C] of a context."""
        return self.to_k(context), self.to_v(context)

    def __call__(self, x: Float[Array, "b n c"], projected=None, bias=None):
        """x [B, N, C] over itself, or over `projected` (of `project`) and `bias`: [B, N, C]."""
        if projected is None:
            return self.to_out[0](self._over_itself(x))
        return self.to_out[0](attend(self.to_q(x), *projected, self.heads, bias))

    def _over_itself(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        def apart(x, *_):
            return attend(self.to_q(x), *self.project(x), self.heads)

        batch, n, _ = x.shape
        if x.dtype != jnp.bfloat16 or self.to_q.bias is not None:
            return apart(x)
        from composer_jax.models import fused  # as in `attend`

        kernel = split(fused.packed_attention, batch, self.heads)
        if kernel is None or not fused.pays(n, n):
            return apart(x)

        def packed(x, *kernels):  # one product, whose result the kernel takes as it is
            width, heads = x.shape[2], self.heads
            kernel_CxHx3xD = jnp.stack([k.reshape(width, heads, -1) for k in kernels], axis=2)
            qkv = matmul(x, scattered(kernel_CxHx3xD.reshape(width, -1), axis=0))
            return kernel(qkv.reshape(batch, n, heads, 3, -1)).reshape(batch, n, -1)

        kernels = (layer.kernel[...].astype(x.dtype) for layer in (self.to_q, self.to_k, self.to_v))
        return jax.lax.platform_dependent(x, *kernels, tpu=packed, default=apart)
