"""Convolutions in the forms that platforms take them in."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.models.blocks import Upsample, conv3
from composer_jax.models.convolution import _by_places


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def direct(kernel, x):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def squared(function, *inputs):
    """What a function gives, and the gradient of its squared length, in one program."""

    def length(*inputs):
        found = function(*inputs)
        return jnp.sum(found**2), found

    every = tuple(range(len(inputs)))
    gradient, found = jax.jit(jax.grad(length, every, has_aux=True))(*inputs)
    return found, gradient


def close(found, wanted, tolerance):
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("side", [(8, 8), (7, 13), (32, 32), (33, 45)])
def test_a_convolution_by_minimal_filtering_is_a_convolution(side):
    conv = conv3(64, 96, rngs=nnx.Rngs(0))
    x = draw(1, 2, *side, 64)
    kernel = conv.kernel[...]
    assert "winograd_kernel" in str(jax.make_jaxpr(conv)(x))
    (found, gradient), (wanted, other) = squared(conv, x), squared(partial(direct, kernel), x)
    close(found, wanted, 1e-5)
    close(gradient[0], other[0], 2e-5)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_elsewhere_than_on_cpu_a_convolution_is_one(platform):
    conv, x = conv3(64, 96, rngs=nnx.Rngs(0)), draw(1, 2, 8, 8, 64)
    program = jax.jit(conv).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.convolution") == 1 and "dot_general" not in program
    here = jax.jit(conv).lower(x).as_text()
    assert "stablehlo.convolution" not in here and "dot_general" in here


@pytest.mark.parametrize("axes", [(1, 2), (1,)])
@pytest.mark.parametrize("side", [(4, 4), (3, 5)])
def test_a_doubled_map_is_convolved_place_by_place(side, axes):
    by_places = partial(_by_places, axes=axes)
    x, kernel = draw(1, 2, *side, 8), draw(2, 3, 3, 8, 6)

    def doubled(x, kernel):
        return direct(kernel, x.repeat(2, axis=1).repeat(2, axis=2))

    (found, gradient), (wanted, other) = (squared(f, x, kernel) for f in (by_places, doubled))
    for a, b in zip((found, *gradient), (wanted, *other), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize(
    ("platform", "side", "count"),
    [("tpu", 32, 4), ("tpu", 16, 2), ("tpu", 8, 1), ("cuda", 32, 1), ("cpu", 32, 1)],
)
def test_large_maps_are_convolved_so_on_tpus(platform, side, count):
    upsample = Upsample(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = draw(1, 2, side, side, 64).astype(jnp.bfloat16)
    program = jax.jit(upsample).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.convolution") == count
