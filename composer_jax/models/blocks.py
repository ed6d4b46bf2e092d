"""The pieces that VAE and UNet share, with the module names and numerics of diffusers."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

ZEROS = nnx.initializers.zeros_init()  # for the last layer of a branch around a skip
MASKED = -1e9  # what a token that must not be seen gets in its attention logits; finite, no NaN


class Keys:
    """Keys for initialisers, in place of `nnx.Rngs`, whose count is itself traced.

    That makes the time to trace a module quadratic in its parameters: 8 s for Stable Diffusion's
    UNet, where this takes 1 s.
    """

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


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


# F(m x m, 3 x 3) of arXiv 1509.09308 by m, the transforms of data, kernel and result: B^T, G, A^T.
WINOGRAD = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
         [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}  # fmt: skip


def _kron(matrix, x) -> jax.Array:
    """The Kronecker square of `matrix` [r, s] over the first axis of x [s^2, ...]: [r^2, ...]."""
    square = jnp.asarray(np.kron(matrix, matrix), x.dtype)
    return jax.lax.dot(square, x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


def _winograd(x, kernel) -> jax.Array:
    """The 3 x 3 convolution of x [B, H, W, C], padded by 1, by Winograd's minimal filtering.

    The kernel's transform ends in a dot: XLA takes that out of a sampler's loop, which it does not
    do to a transposition. The transformed kernel is 16/9 as large with m = 2 and 4 times as large
    with m = 4, which is for large maps, whose kernels are small. Relative errors (L2) are 6e-7 and
    4e-6, a direct convolution's 4e-7.
    """
    _, height, width, c_in = x.shape
    m = 4 if height * width >= 32 * 32 else 2
    transform, of_kernel, back = WINOGRAD[m]
    h, w = -(-height // m), -(-width // m)
    x = jnp.pad(x, ((0, 0), (1, 1 + m * h - height), (1, 1 + m * w - width), (0, 0)))
    rows = jnp.stack([x[:, i : i + m * h : m] for i in range(m + 2)])
    tiles = jnp.stack([rows[:, :, :, j : j + m * w : m] for j in range(m + 2)], axis=1)
    tiles_KxBxhxwxC = tiles.reshape(-1, *tiles.shape[2:])
    x_KxNxC = _kron(transform, tiles_KxBxhxwxC).reshape(len(tiles_KxBxhxwxC), -1, c_in)
    kernel_KxCxD = _kron(of_kernel, kernel.reshape(9, c_in, -1))
    y_MxNxD = _kron(back, jax.lax.batch_matmul(x_KxNxC, kernel_KxCxD))
    y_mxmxBxhxwxD = y_MxNxD.reshape(m, m, -1, h, w, kernel.shape[3])
    y = y_mxmxBxhxwxD.transpose(2, 3, 0, 4, 1, 5).reshape(-1, m * h, m * w, kernel.shape[3])
    return y[:, :height, :width]


@jax.named_scope("convolution")
def _convolve(x, kernel, strides, padding, **options) -> jax.Array:
    # On CPU, XLA's convolution takes 1.5 to 5 times Winograd's time from about 64 channels on: the
    # more, the deeper the level. Maps above 64 x 64 would need too much memory for their tiles.
    direct = partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options
    )
    if (
        strides != (1, 1)
        or padding != [(1, 1), (1, 1)]
        or x.dtype != jnp.float32
        or min(kernel.shape[2:]) < 64
        or x.shape[1] * x.shape[2] > 64 * 64
    ):
        return direct(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_winograd, default=direct)


def conv3(c_in: int, c_out: int, *, stride: int = 1, padding=1, **options) -> nnx.Conv:
    """A 3 x 3 convolution; `options` are `nnx.Conv`'s."""
    options["conv_general_dilated"] = _convolve
    return nnx.Conv(c_in, c_out, (3, 3), strides=stride, padding=padding, **options)


@jax.named_scope("linear")
def _matmul(x, kernel, *_, precision=None, **__) -> jax.Array:
    # XLA's CPU backend computes a kernel's gradient up to five times slower where x has more than
    # two axes, or where the product is written as a 1 x 1 convolution. Elsewhere it is the same.
    kernel = kernel.reshape(kernel.shape[-2:])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return jax.lax.dot(rows, kernel, precision=precision).reshape(*x.shape[:-1], kernel.shape[1])


def linear(c_in: int, c_out: int, **options) -> nnx.Linear:
    """A linear layer over the last axis; `options` are `nnx.Linear`'s."""
    return nnx.Linear(c_in, c_out, dot_general=_matmul, **options)


def conv1(c_in: int, c_out: int, **options) -> nnx.Conv:
    """A 1 x 1 convolution; `options` are `nnx.Conv`'s."""
    return nnx.Conv(c_in, c_out, (1, 1), conv_general_dilated=_matmul, **options)


def group_norm(channels: int, groups: int, eps: float, *, dtype, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm over channels-last arrays."""
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=eps, dtype=dtype, rngs=rngs)


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
        self.conv2 = conv3(c_out, c_out, kernel_init=ZEROS, **options)
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
        self.conv = conv3(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """x [B, H, W, C]; returns [B, 2H, 2W, C]."""
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


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


@jax.named_scope("attention")
def attend(
    q, k, v, heads: int, bias: Float[Array, "b l"] | None = None, causal: bool = False
) -> Float[Array, "b n c"]:
    """Softmax attention of q [B, N, C] over k, v [B, L, C]; `bias` [B, L] joins the logits.

    `causal`: a position sees itself and those before it.
    """
    batch, n, channels = q.shape
    shape = (batch, -1, heads, channels // heads)
    if bias is not None:
        bias = bias[:, None, None, :].astype(q.dtype)
    q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
    plain = partial(jax.nn.dot_product_attention, is_causal=causal)
    fused = partial(plain, implementation="cudnn") if _suits_cudnn(q, k, bias) else plain

    def on_cpu(q, k, v, bias=None):
        length = k.shape[1]
        every = jnp.zeros((batch, heads, 1, length), q.dtype)
        if bias is not None:
            every = every + bias
        if causal:
            every = every + jnp.where(jnp.tri(n, length, dtype=bool), 0.0, MASKED)[None, None]
        return _attend_on_cpu(q, k, v, every)

    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    cpu = on_cpu if q.dtype == jnp.float32 else plain
    out = jax.lax.platform_dependent(*inputs, cpu=cpu, default=fused)
    return out.reshape(batch, n, channels)


def _suits_cudnn(q, k, bias) -> bool:
    """Whether cuDNN's fused attention takes these [B, N, H, D]; it has half precision alone."""
    return (
        "NVIDIA" in jax.devices()[0].device_kind
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and (bias is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0))
    )


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
        """x [B, N, C] over `projected` (of `project`), or over itself; returns [B, N, C]."""
        k, v = self.project(x) if projected is None else projected
        return self.to_out[0](attend(self.to_q(x), k, v, self.heads, bias))
