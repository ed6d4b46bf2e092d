"""What is the same in every turn of a loop is done before it, in branches, too."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax.models.blocks import conv3
from composer_jax.sampling.once import hoisted


def test_a_kernel_is_transformed_before_the_loop_whose_branches_use_it():
    conv, x = conv3(64, 64, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (1, 8, 8, 64))

    def turns(function, x):
        def turn(i, x):
            return jax.lax.cond(i % 2 == 0, lambda: function(x, 0.5), lambda: x)

        return jax.lax.fori_loop(0, 4, turn, x)

    def plain(x, scale):
        return scale * conv(x)

    def early(x):
        return turns(hoisted(plain, x, jnp.float32(1.0)), x)

    np.testing.assert_allclose(jax.jit(early)(x), turns(plain, x), rtol=1e-5, atol=1e-6)

    def inside(function):
        [loop] = [e for e in jax.make_jaxpr(function)(x).eqns if e.primitive.name == "scan"]
        return str(loop).count("winograd_kernel")

    assert inside(lambda x: turns(plain, x)) == 1
    assert inside(early) == 0
