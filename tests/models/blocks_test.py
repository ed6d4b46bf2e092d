"""Attention in the forms that platforms take it in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.models.blocks import (
    MASKED,
    attend,
    bias_as_feature,
    group_norm,
    layer_norm,
    lecun_normal,
)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_bias_as_a_feature_is_the_bias(heads):
    """What cuDNN is given, whose own bias is as large as the logits."""
    q, k, v = (draw(i, 2, n, heads, 24) for i, n in enumerate((10, 7, 7)))
    bias = jnp.log(jax.random.uniform(jax.random.key(3), (2, 7))).at[:, 2].set(MASKED)
    wide = bias_as_feature(q, k, v, bias)
    assert {x.shape[-1] for x in wide} == {32}
    found = jax.nn.dot_product_attention(*wide, scale=24**-0.5)
    wanted = jax.nn.dot_product_attention(q, k, v, bias[:, None, None])
    np.testing.assert_allclose(found[..., :24], wanted, atol=2e-6)
    np.testing.assert_array_equal(found[..., 24:], 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [24, 520])  # all heads at once, and head by head
def test_attention_on_cpu_is_attention(length, causal):
    q, k, v = (draw(i, 2, length, 32) for i in range(3))
    bias = draw(3, 2, length).at[:, 5].set(MASKED)
    found = attend(q, k, v, 4, bias, causal)
    heads = (x.reshape(2, length, 4, 8) for x in (q, k, v))
    wanted = jax.nn.dot_product_attention(*heads, bias[:, None, None], is_causal=causal)
    np.testing.assert_allclose(found, wanted.reshape(2, length, 32), atol=2e-6)


def test_kernels_start_as_flaxs_own_do():
    found, wanted = (
        np.asarray(init(jax.random.key(3), (3, 3, 5, 8), jnp.float32))
        for init in (lecun_normal, nnx.initializers.lecun_normal())
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
def test_norms_are_exact_where_the_mean_is_large(mean):
    x = (mean + np.random.default_rng(0).normal(size=(2, 16, 16, 32))).astype(np.float32)
    options = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    norms = (
        (group_norm(32, 8, 1e-5, **options), x.reshape(2, 256, 8, 4), (1, 3)),
        (layer_norm(32, 1e-5, **options), x, -1),
    )
    for norm, grouped, axes in norms:
        exact = grouped.astype(np.float64)
        exact -= exact.mean(axes, keepdims=True)
        exact /= np.sqrt((exact**2).mean(axes, keepdims=True) + 1e-5)
        error = np.asarray(norm(x)) - exact.reshape(x.shape)
        assert np.sqrt(np.mean(error**2)) < max(5e-7 * mean, 1e-6)  # fast: 2e-7 of its square
