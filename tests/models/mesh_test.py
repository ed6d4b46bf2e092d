"""What networks say of the mesh: kernels on each device's own part, gradients summed in parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.models import fused
from composer_jax.models.mesh import scattered, split
from composer_jax.training.sharding import batch_sharding, make_mesh

pytestmark = pytest.mark.mesh  # meshes


@pytest.mark.parametrize("biased", [False, True])
def test_over_a_mesh_each_device_takes_its_own_examples_and_heads(biased):
    mesh = make_mesh(2, 2, 2)
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 128, 2, 8)) for i in range(3))
    bias = [jax.random.normal(jax.random.key(3), (4, 128))] if biased else []
    with jax.set_mesh(mesh):
        kernel = split(partial(fused.attention, interpret=True), 4, 2)
        found = jax.jit(kernel)(q, k, v, *bias)
        assert split(fused.attention, 3, 2) is None  # an example left over
    assert found.sharding.shard_shape(found.shape) == (1, 128, 1, 8)
    wanted = jax.nn.dot_product_attention(q, k, v, bias[0][:, None, None, :] if biased else None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_gradient_lies_in_parts_where_a_mesh_splits_the_state():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    kernel = 0.1 * jax.random.normal(jax.random.key(1), (16, 12))  # sines of small angles

    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.sum(jnp.sin(x @ scattered(k, axis=0))))(kernel)

    wanted = jax.jit(gradient)(x, kernel)
    for mesh, rows in ((make_mesh(2, 4, 1), 4), (make_mesh(8, 1, 1), 16), (make_mesh(1, 8, 1), 2)):
        with jax.set_mesh(mesh):
            found = jax.jit(gradient)(jax.device_put(x, batch_sharding(mesh)), kernel)
        assert found.sharding.shard_shape(found.shape) == (rows, 12)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    with jax.set_mesh(make_mesh(1, 8, 1)):  # 8 divides 16, not 12
        assert scattered(kernel, axis=1) is kernel
