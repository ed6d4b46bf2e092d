"""The UNet: Stable Diffusion's shape, masks that mask, context projected once."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.models.blocks import MASKED, depth_to_space, space_to_depth
from composer_jax.models.initializers import abstract, described, initialised
from composer_jax.models.unet import PRESETS, UNet, UNetConfig, timestep_embedding


@pytest.fixture(scope="module")
def unet(perturbed):
    return perturbed(initialised(described(UNet, PRESETS["tiny"]), 0), 1)


@pytest.mark.parametrize(("name", "count"), [("sd15", 859_520_964), ("sd21", 865_910_724)])
def test_stable_diffusions_shape(name, count):
    unet = abstract(UNet, PRESETS[name])
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(unet))}
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(unet))) == count
    assert {
        "time_embedding.linear_2.kernel",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.kernel",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.kernel",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.bias",
        "up_blocks.0.upsamplers.0.conv.kernel",
        "conv_norm_out.scale",
    } <= names


@partial(jax.jit, static_argnums=0)
def evaluate(graph, state, context, bias):
    unet = nnx.merge(graph, state)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 38))
    timesteps = jnp.array([3.0, 800.0])
    once = unet(x, timesteps, unet.project_context(context), bias)
    return once, unet(x, timesteps, context, bias)


def test_projected_context_is_the_same_and_masked_tokens_are_unseen(unet):
    graph, state = nnx.split(unet)
    context = jax.random.normal(jax.random.key(2), (2, 5, 128))
    bias = jnp.zeros((2, 5)).at[:, 3:].set(MASKED)
    once, plain = evaluate(graph, state, context, bias)
    assert once.shape == (2, 8, 8, 6)
    np.testing.assert_array_equal(once, plain)
    other, _ = evaluate(graph, state, context.at[:, 3:].set(7.0), bias)
    np.testing.assert_array_equal(other, once)
    seen, _ = evaluate(graph, state, context.at[:, :3].set(7.0), bias)
    assert np.max(np.abs(seen - once)) > 1e-4
    nothing, _ = evaluate(graph, state, context, jnp.full((2, 5), MASKED))
    assert np.all(np.isfinite(nothing))


def test_timestep_embedding_is_the_papers():
    t, width = 321.0, 16
    wanted = [math.cos(t * 10000 ** (-i / 8)) for i in range(8)]
    wanted += [math.sin(t * 10000 ** (-i / 8)) for i in range(8)]
    np.testing.assert_allclose(timestep_embedding(jnp.array([t]), width)[0], wanted, atol=2e-4)


def test_folding_is_undone():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    folded = space_to_depth(x, 2)
    assert folded.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(folded[0, 1, 1, :3], x[0, 2, 2])
    np.testing.assert_array_equal(depth_to_space(folded, 2), x)


def test_config_survives_json_and_is_strict():
    for config in PRESETS.values():
        assert UNetConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no key 'width'"):
        UNetConfig.from_dict({"width": 3})
