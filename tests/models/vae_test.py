"""The codec: Stable Diffusion's shape, standardised latents, a linear start that helps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.models.initializers import abstract, described, initialised
from composer_jax.models.vae import (
    NORMS,
    PRESETS,
    VAE,
    VAEConfig,
    codec_loss,
    pca_skip,
    standardised,
)

SMALL = replace(PRESETS["scenes64"], block_out_channels=(16,))


@pytest.fixture(scope="module")
def images():
    from composer_jax.data.scenes import Scenes

    return jnp.asarray(Scenes(16, size=32).batch(range(16))["image"], jnp.float32) / 127.5 - 1.0


def build(config):
    return initialised(described(VAE, config), 0)


def test_stable_diffusions_shape():
    vae = abstract(VAE, PRESETS["sd"])
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(vae))}
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(vae))) == 83_653_863
    assert {
        "encoder.down_blocks.0.downsamplers.0.conv.kernel",
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.kernel",
        "post_quant_conv.bias",
    } <= names
    assert vae.factor == 8


def test_shapes_of_several_levels():
    config = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    vae = build(config)
    moments = vae.encode(jnp.zeros((2, 16, 24, 3)))
    assert moments.shape == (2, 8, 12, 8)
    assert vae.decode(vae.latents(moments)).shape == (2, 16, 24, 3)


def test_principal_components_are_the_best_linear_start(images):
    vae = build(SMALL)
    pca_skip(vae, images)
    moments = nnx.jit(VAE.encode)(vae, images)
    mean = moments[..., :6]
    np.testing.assert_allclose(jnp.std(mean, axis=(0, 1, 2)), 1.0, atol=0.05)
    found = nnx.jit(VAE.decode)(vae, vae.latents(moments))
    patches = np.asarray(images).reshape(16, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(-1, 48)
    centred = patches - patches.mean(0)
    spectrum = np.linalg.svd(centred, compute_uv=False) ** 2
    best = spectrum[6:].sum() / patches.size
    assert abs(float(jnp.mean((found - images) ** 2)) / best - 1.0) < 0.02


def test_latents_are_standardised_by_what_the_config_says(images):
    vae = build(SMALL)
    moments = np.asarray(nnx.jit(VAE.encode)(vae, images))
    vae.config = standardised(SMALL, moments)
    latents = vae.latents(jnp.asarray(moments))
    np.testing.assert_allclose(jnp.mean(latents, axis=(0, 1, 2)), 0.0, atol=1e-3)
    np.testing.assert_allclose(jnp.std(latents, axis=(0, 1, 2)), 1.0, atol=1e-3)
    drawn = vae.latents(jnp.asarray(moments), jax.random.key(0))
    assert np.any(drawn != latents)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_is_finite_and_has_gradients_everywhere(images, perturbed, norm):
    vae = perturbed(build(SMALL), 1)
    graph, params = nnx.split(vae)

    @jax.jit
    def gradient(params, images):
        keys = jax.random.split(jax.random.key(0), 16)
        loss = lambda p: codec_loss(nnx.merge(graph, p), images, keys, 1e-4, 1.0, norm)[0]  # noqa: E731
        return jax.grad(lambda p: loss(p).mean())(params)

    for path, leaf in nnx.to_flat_state(gradient(params, images)):
        assert np.all(np.isfinite(leaf[...])) and np.any(leaf[...] != 0), path


def test_configs_are_strict():
    assert VAEConfig.from_dict(PRESETS["scenes64"].to_dict()) == PRESETS["scenes64"]
    with pytest.raises(ValueError, match="no key 'pach'"):
        VAEConfig.from_dict({"pach": 2})
    with pytest.raises(ValueError, match="single level"):
        VAE(replace(SMALL, block_out_channels=(8, 8)), rngs=nnx.Rngs(0))


def test_the_bundled_codec_is_good():
    from composer_jax.data.scenes import Scenes
    from composer_jax.storage.models import load_codec

    vae = load_codec("bundled")
    images = Scenes(16, size=64, split="test").batch(range(16))["image"].astype(np.float32)
    decoded = nnx.jit(lambda vae, x: vae.decode(vae.latents(vae.encode(x))))(
        vae, jnp.asarray(images) / 127.5 - 1.0
    )
    error = np.mean(((np.clip(decoded, -1, 1) + 1) * 127.5 - images) ** 2, axis=(1, 2, 3))
    assert np.mean(10 * np.log10(255**2 / error)) > 39.0
