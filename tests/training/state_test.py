"""The state at step 0: the same on every mesh, each part drawn once, and nothing shared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from composer_jax.models.files import Tensor
from composer_jax.models.initializers import Start
from composer_jax.training.optimizer import make_optimizer
from composer_jax.training.sharding import make_mesh, shard_tree
from composer_jax.training.state import abstract_state, start_state

pytestmark = pytest.mark.mesh

SHAPES = {"kernel": (24, 16), "bias": (16,), "more": {"kernel": (3, 3, 8, 16)}}
RULES = (("kernel", "fsdp"),)


def drawn(read):
    """Parameters, each of which notes the places that are read of it."""

    def one(shape):
        tensor = Start(shape, np.dtype("float32"), scale=1.0).drawn(0, str(shape))

        def part(index):
            found = tensor.part(index)
            read.append(found.size)
            return found

        def whole():
            raise AssertionError("all of it is read")

        return Tensor(tensor.shape, tensor.dtype, whole, part)

    return jax.tree.map(one, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_it_is_the_same_on_every_mesh_and_each_part_is_drawn_once(sizes):
    read, optimizer = [], optax.adam(1e-3)
    params = drawn(read)
    shapes = abstract_state(params, optimizer, (0.1,))
    assert not read
    shardings = shard_tree(shapes, make_mesh(*sizes), RULES)
    state = start_state(params, optimizer, (0.1,), shardings)
    assert sum(read) == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    for found, tensor in zip(map(jax.device_get, jax.tree.leaves(state.params)),
                             jax.tree.leaves(drawn([])), strict=True):  # fmt: skip
        whole = tuple(slice(0, size) for size in tensor.shape)
        np.testing.assert_array_equal(found, tensor.part(whole))
    for copy in (state.ema, state.averages["0.1"]):
        jax.tree.map(np.testing.assert_array_equal, copy, state.params)
    assert not any(np.any(moment) for moment in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    "optimizer",
    [
        make_optimizer(1e-3, 10, 1, 0.5, 0.1, 1.0, (0.9, 0.99), mu_dtype="bfloat16"),
        make_optimizer(1e-3, 10, 1, 0.5, 0.1, 1.0, (0.9, 0.99), name="muon"),
        optax.chain(optax.ema(0.9), optax.adam(1.0)),
        optax.stateless(lambda updates, params: updates),
        optax.GradientTransformation(lambda params: params, lambda *each: each[:2]),  # of its own
    ],
)
def test_an_optimizer_s_state_is_what_it_begins_with(optimizer):
    params = {"kernel": np.full((8, 4), 3.0, np.float32), "bias": np.full(4, 5.0, np.float32)}
    shardings = shard_tree(abstract_state(params, optimizer), make_mesh(1, 8, 1), RULES)
    state = start_state(params, optimizer, (), shardings)
    wanted = optimizer.init(jax.tree.map(jnp.asarray, params))
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(wanted)
    for found, leaf in zip(*map(jax.tree.leaves, (state.opt_state, wanted)), strict=True):
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(found, leaf)
    jax.jit(lambda state: jax.tree.map(lambda leaf: 2 * leaf, state), donate_argnums=0)(state)


def test_arrays_may_be_given_and_copies_are_their_own():
    params = {"kernel": np.ones((8, 4), np.float32)}
    optimizer = optax.sgd(1.0)
    shardings = shard_tree(abstract_state(params, optimizer), make_mesh(1, 8, 1), RULES)
    state = start_state(params, optimizer, (), shardings)
    moved = jax.jit(lambda p: jax.tree.map(lambda a: a + 1.0, p), donate_argnums=0)(state.params)
    np.testing.assert_array_equal(moved["kernel"], 2.0)
    np.testing.assert_array_equal(state.ema["kernel"], 1.0)
    np.testing.assert_array_equal(params["kernel"], 1.0)
