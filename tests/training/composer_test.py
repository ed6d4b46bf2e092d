"""The composer's own step: the same on every mesh, whole or in parts, in bfloat16 nearly so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from composer_jax.models.vae import PRESETS
from composer_jax.training.composer import make_recipe
from composer_jax.training.optimizer import make_optimizer
from composer_jax.training.sharding import batch_sharding, gathered, make_mesh, shard_tree
from composer_jax.training.state import abstract_state, start_state
from composer_jax.training.step import jit_step
from tests.small import small_config

pytestmark = pytest.mark.mesh  # meshes

NAMES, SIZES = ("depth", "mask", "palette"), {"text_length": 4, "text_width": 8, "embed_width": 8}
STEPS, BATCH = 5, 16


def recipe(dtype="float32", *overrides):
    config = small_config([f"dtype={dtype}", *overrides])
    config.model.stem_width, config.model.context_length = 16, 8
    config.image_size = 16
    return make_recipe(config, NAMES, SIZES, PRESETS["scenes64"], {})


def batch(step):
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        "moments": rng.normal(size=(BATCH, 4, 4, 12)).astype(np.float16),
        "stored": {
            "depth": rng.integers(0, 65536, (BATCH, 16, 16), np.uint16),
            "palette": rng.dirichlet(np.ones(156), BATCH).astype(np.float32),
        },
    }


def losses(recipe, mesh, accumulate=1, dtype="float32"):
    """Of five steps over a mesh; and the bytes that one device holds of the state, and all do."""
    optimizer = make_optimizer(1e-3, 10, 1, 0.5, 0.0, 1.0, (0.9, 0.99))
    of = recipe.params, optimizer, (0.1,)
    shardings = shard_tree(abstract_state(*of), mesh, (("kernel", "fsdp"),))
    state = start_state(*of, shardings)
    jitted = jit_step(shardings, recipe.loss, optimizer, 0.9, accumulate, dtype)
    found = []
    for at in range(STEPS):
        state, metrics = jitted(
            state, jax.device_put(batch(at), batch_sharding(mesh)), np.uint32(0)
        )
        found.append([float(metrics[key]) for key in ("loss", "grad_norm", "update_norm")])
    leaves = jax.tree.leaves(state)
    mine = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return np.asarray(found), mine, sum(leaf.nbytes for leaf in leaves)


@pytest.fixture(scope="module")
def one():
    return losses(recipe(), make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_gives_the_losses_of_one_device_and_splits_the_state(one, sizes):
    found, mine, every = losses(recipe(), make_mesh(*sizes))
    np.testing.assert_allclose(found, one[0], rtol=1e-5)
    assert every == one[2]
    assert mine < 1.25 * every / sizes[1]  # norms and biases stay whole


def test_parts_of_a_batch_give_the_losses_of_the_whole(one):
    found, *_ = losses(recipe(), make_mesh(2, 2, 2), accumulate=2)
    np.testing.assert_allclose(found, one[0], rtol=1e-5)
    np.testing.assert_allclose(found[0], one[0][0], rtol=1e-6)


def test_bfloat16_computes_nearly_the_same_and_keeps_its_state_in_float32(one):
    half = recipe("bfloat16")
    found, _, every = losses(half, make_mesh(devices=jax.devices()[:1]), dtype="bfloat16")
    np.testing.assert_allclose(found[:, 0], one[0][:, 0], rtol=2e-2)
    assert not np.array_equal(found, one[0]) and every == one[2]
    split, *_ = losses(half, make_mesh(1, 8, 1), dtype="bfloat16")
    np.testing.assert_allclose(split, found, rtol=2e-2)


def test_split_parameters_are_whole_in_the_loss_and_their_gradients_are_split():
    mesh = make_mesh(1, 4, 2)
    params = {"kernel": jnp.ones((8, 16)), "scale": jnp.ones(16), "wide": {"kernel": jnp.ones(6)}}
    places = shard_tree(params, mesh, (("wide", "tensor"), ("kernel", "fsdp")))
    found = []

    def loss(params):
        whole = gathered(params, places, "bfloat16")
        found.append(jax.tree.map(lambda leaf: leaf.dtype.name, whole))
        jax.debug.inspect_array_sharding(whole["kernel"], callback=found.append)
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(whole))

    gradient = jax.jit(jax.grad(loss))(jax.device_put(params, places))
    assert found[0] == {"kernel": "bfloat16", "scale": "float32", "wide": {"kernel": "float32"}}
    assert found[1].is_fully_replicated
    assert gradient["kernel"].sharding == places["kernel"] != NamedSharding(mesh, PartitionSpec())
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, 2.0)


def test_a_chance_of_what_is_not_trained_is_said_to_be_without_effect(caplog):
    recipe("float32", "keep_each.sketch=0.5", "keep_each.depth=0.5")
    assert caplog.messages == ["keep_each.sketch is without effect: sketch is not trained"]
