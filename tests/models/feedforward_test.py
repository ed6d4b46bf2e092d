"""The gate's gradient: JAX's own, from less that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.models.feedforward import gated


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def plain(x, bias):
    x, gate = jnp.split(x + bias[None, None], 2, axis=-1)
    return x * jax.nn.gelu(gate, approximate=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_the_gate_and_its_gradient_are_jaxs_own(dtype, tolerance):
    inputs, d_out = (3.0 * draw(0, 2, 50, 64), draw(1, 64)), draw(2, 2, 50, 32)
    wanted, back = jax.vjp(plain, *inputs)
    found, own_back = jax.vjp(gated, *(x.astype(dtype) for x in inputs))
    pairs = [(found, wanted), *zip(own_back(d_out.astype(dtype)), back(d_out), strict=True)]
    for a, b in pairs:
        assert a.dtype == dtype
        assert np.linalg.norm(a.astype(jnp.float32) - b) <= tolerance * np.linalg.norm(b)


def test_only_the_gates_inputs_are_kept():
    x, bias = draw(0, 2, 50, 64), draw(1, 64)
    _, back = jax.eval_shape(lambda *inputs: jax.vjp(gated, *inputs), x, bias)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(back)) == [(2, 50, 64), (64,)]
