"""Convolutions in the forms that platforms take them in."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.models.mesh import scattered

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


@partial(jax.jit, static_argnums=1)
def winograd_kernel(kernel, m: int) -> jax.Array:
    """The transform of a kernel [3, 3, C, D], on CPU: [(m + 2)^2, C, D], for `_winograd`."""

    def transformed(kernel):
        return _kron(WINOGRAD[m][1], kernel.reshape(9, *kernel.shape[2:]))

    def unused(kernel):
        return jnp.zeros(((m + 2) ** 2, *kernel.shape[2:]), kernel.dtype)

    return jax.lax.platform_dependent(kernel, cpu=transformed, default=unused)


def _winograd(x, kernel_KxCxD, m: int) -> jax.Array:
    """The 3 x 3 convolution of x [B, H, W, C], padded by 1, by Winograd's minimal filtering.

    The transformed kernel is 16/9 as large with m = 2 and 4 times as large with m = 4, which is for
    large maps, whose kernels are small. Relative errors (L2) are 6e-7 and 4e-6, a direct
    convolution's 4e-7.
    """
    _, height, width, c_in = x.shape
    transform, _, back = WINOGRAD[m]
    c_out = kernel_KxCxD.shape[2]
    h, w = -(-height // m), -(-width // m)
    x = jnp.pad(x, ((0, 0), (1, 1 + m * h - height), (1, 1 + m * w - width), (0, 0)))
    rows = jnp.stack([x[:, i : i + m * h : m] for i in range(m + 2)])
    tiles = jnp.stack([rows[:, :, :, j : j + m * w : m] for j in range(m + 2)], axis=1)
    tiles_KxBxhxwxC = tiles.reshape(-1, *tiles.shape[2:])
    x_KxNxC = _kron(transform, tiles_KxBxhxwxC).reshape(len(tiles_KxBxhxwxC), -1, c_in)
    y_MxNxD = _kron(back, jax.lax.batch_matmul(x_KxNxC, kernel_KxCxD))
    y_mxmxBxhxwxD = y_MxNxD.reshape(m, m, -1, h, w, c_out)
    y = y_mxmxBxhxwxD.transpose(2, 3, 0, 4, 1, 5).reshape(-1, m * h, m * w, c_out)
    return y[:, :height, :width]


@jax.named_scope("convolution")
def convolve(x, kernel, strides, padding, **options) -> jax.Array:
    """`jax.lax.conv_general_dilated` of x [B, H, W, C], by Winograd's filtering where that pays."""
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
    m = 4 if x.shape[1] * x.shape[2] >= 32 * 32 else 2
    return jax.lax.platform_dependent(
        x,
        kernel,
        winograd_kernel(kernel, m),
        cpu=lambda x, kernel, transformed: _winograd(x, transformed, m),
        default=lambda x, kernel, transformed: direct(x, kernel),
    )


def _halves(kernel, axis: int) -> tuple[jax.Array, jax.Array]:
    """What even and odd places see of a doubled axis: two taps each, for three."""
    one, two, three = jnp.split(kernel, 3, axis)
    return jnp.concatenate([one, two + three], axis), jnp.concatenate([one + two, three], axis)


def _by_places(x, kernel, axes: tuple[int, ...]) -> jax.Array:
    """The 3 x 3 convolution of x doubled by nearest neighbour, padded by 1, with `axes` undoubled.

    Places of each parity see two of three taps along each of `axes` (1: rows, 2: columns): 2/3 or
    4/9 of the arithmetic.
    """
    batch, height, width, _ = x.shape
    for axis in {1, 2} - set(axes):
        x = x.repeat(2, axis)

    def convolved(kernel, axes, padding):
        if not axes:
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, scattered(kernel, axis=2), (1, 1), padding.values(), dimension_numbers=numbers
            )
        axis, rest = axes[0], axes[1:]
        places = [
            convolved(half, rest, padding | {axis: (1 - i, i)})
            for i, half in enumerate(_halves(kernel, axis - 1))
        ]
        return jnp.stack(places, axis + 1)

    y = convolved(kernel, axes, {1: (1, 1), 2: (1, 1)})
    return y.reshape(batch, 2 * height, 2 * width, -1)


@jax.named_scope("convolution")
def convolve_doubled(x, kernel, strides, padding, **options) -> jax.Array:
    """`convolve` of x doubled in height and width by nearest neighbour; 3 x 3, padded by 1."""

    def doubled(x, kernel):
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return convolve(x, kernel, strides, padding, **options)

    # On TPUs by 2 x 2, or 2 x 3 where kernels weigh more: forward and backward of 4 examples, by
    # the compiler's estimate for v5p, 0.96 to 0.77 ms at 32 x 32 x 640, 0.96 to 0.81 (by 2 x 2:
    # 0.86) at 16 x 16 x 1280; on smaller maps the kernels cost what the arithmetic gains.
    places = x.shape[1] * x.shape[2]
    if x.dtype != jnp.bfloat16 or places < 16 * 16:
        return doubled(x, kernel)
    by_places = partial(_by_places, axes=(1, 2) if places >= 32 * 32 else (1,))
    return jax.lax.platform_dependent(x, kernel, tpu=by_places, default=doubled)
