"""Depth networks: any size, one image at a time or many, and what surrounds the network."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from composer_jax.models.depth import MAX_PIXELS, NEAREST, Preprocess, depth_tool
from composer_jax.models.dpt import DPT, DPTConfig, Enlarge
from composer_jax.models.initializers import abstract

TINY = DPTConfig(
    grid=5,
    patch=4,
    width=16,
    hidden=24,
    heads=2,
    taps=(1, 2),
    factors=(2.0, 0.5),
    neck_widths=(4, 6),
    fusion_width=8,
    head_width=5,
    preprocess=Preprocess(size=(20, 20), multiple=4),
)
VIT = replace(TINY, family="dpt", normed_taps=False, readout="project")


def build(config, dtype=jnp.float32):
    """A network of random weights, none of them where it starts; depth is mostly above 0."""
    network = abstract(DPT, config, dtype=dtype)
    state, draw = nnx.state(network), np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        values = draw.normal(0, 0.3 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5, shape)
        values += 1.0 if path[-1] == "scale" or path[:2] == ("head", "conv3") else 0.0
        variable.set_value(jnp.asarray(values, jnp.float32))
    nnx.update(network, state)
    return network


@pytest.fixture(scope="module")
def photos():
    image = Image.fromarray(skimage.data.coffee())
    boxes = [(0, 0, 400, 300), (100, 50, 500, 350), (200, 100, 600, 400)]
    return np.stack([np.asarray(image.crop(box).resize((36, 27))) for box in boxes])


@pytest.mark.parametrize("size", [(20, 20), (12, 30), (27, 9)])
def test_any_size_and_no_image_sees_another(size):
    images = jax.random.normal(jax.random.key(0), (3, *size, 3))
    for config in (TINY, VIT):
        network = nnx.jit(build(config))
        depth = network(images)
        patches = [side // config.patch for side in size]
        if config.family == "depth_anything":
            assert depth.shape == (3, *(side * config.patch for side in patches))
        alone = jnp.concatenate([network(images[i : i + 1]) for i in range(3)])
        np.testing.assert_allclose(depth, alone, atol=1e-5)
        assert depth.dtype == jnp.float32 and float(jnp.std(depth, axis=(1, 2)).min()) > 1e-3


def test_enlarging_is_a_transposed_convolution():
    layer = Enlarge(2, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray([0.5, -1.0])
    x = np.random.default_rng(0).random((1, 2, 4, 2), np.float32)
    wanted = np.empty((1, 6, 12, 2))
    for a in range(3):
        for b in range(3):
            wanted[:, a::3, b::3] = x @ np.asarray(layer.up_kernel[a, b]) + [0.5, -1.0]
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, atol=1e-6)


def test_config_survives_json_and_is_strict():
    for config in (DPTConfig(), TINY, VIT):
        assert DPTConfig.from_dict(config.to_dict()) == config
    values = TINY.to_dict()
    for key, wrong, word in [
        ("widths", 3, "no key 'widths'"),
        ("width", "16", "width is '16'"),
        ("width", True, "width is True"),
        ("width", 15, "2 heads do not divide"),
        ("eps", float("nan"), "eps is nan"),
        ("taps", 2, "taps is 2, not a list"),
        ("taps", [2, 1], "must rise"),
        ("taps", [1, 1000], "to 256 at most"),
        ("taps", [], "not a list"),
        ("taps", [[1], 2], "taps is"),
        ("factors", [2.0, 0.4], "factor 0.4"),
        ("factors", [1.0], "one length"),
        ("fusion_width", 7, "not even"),
        ("family", "midas", "allowed: depth_anything, dpt"),
        ("readout", None, "readout is None"),
        ("preprocess", 1, "not a Preprocess"),
        ("preprocess", {"mode": 1}, "no key 'mode'"),
        ("preprocess", {"resample": 9}, "no filter"),
        ("preprocess", {"std": [1, 1]}, "3 numbers"),
    ]:
        with pytest.raises(ValueError, match=word):
            DPTConfig.from_dict(values | {key: wrong})


def processor(**options):
    from transformers import DPTImageProcessor

    return DPTImageProcessor(size={"height": 84, "width": 70}, **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.booleans(), st.sampled_from([1, 14, 32]))
def test_sizes_are_those_of_transformers(height, width, keep, multiple):
    from transformers.models.dpt.image_processing_dpt import get_resize_output_image_size as theirs

    ours = Preprocess(size=(84, 70), keep_aspect_ratio=keep, multiple=multiple)
    wanted = theirs(np.zeros((height, width, 3)), (84, 70), keep, multiple, "channels_last")
    assert ours.shape(height, width) == tuple(max(side, multiple) for side in wanted)


def test_pixels_are_those_of_transformers(photos):
    options = {"image_mean": [0.4, 0.5, 0.3], "image_std": [0.2, 0.3, 0.25], "resample": 2}
    wanted = processor(keep_aspect_ratio=True, ensure_multiple_of=14, **options)(
        list(photos), return_tensors="np"
    )["pixel_values"]
    ours = Preprocess((84, 70), resample=2, mean=(0.4, 0.5, 0.3), std=(0.2, 0.3, 0.25))
    found = ours.normalise(ours.resize(photos))
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), atol=2e-6)


def test_ribbons_have_a_patch_or_a_plain_error():
    assert Preprocess().shape(10, 10000) == (14, 518)
    with pytest.raises(ValueError, match="50000 x 500 pixels is too long"):
        Preprocess().shape(500, 50000)
    assert np.prod(Preprocess().shape(500, 3000)) <= MAX_PIXELS


def test_tool_gives_maps_of_the_images_size(photos):
    tool = build(TINY).tool()
    many = np.concatenate([photos] * 3)  # nine: a full batch and a rest
    maps = tool(many)
    assert maps.shape == (9, 27, 36) and maps.dtype == np.float32 and maps.std() > 1e-3
    for i in (0, 1, 8):
        np.testing.assert_allclose(tool(many[i : i + 1])[0], maps[i], atol=1e-5)
    for wrong in (photos[0], photos / 255, photos[..., :1], photos[:0]):
        with pytest.raises(ValueError, match=r"takes images uint8 \[B, H, W, 3\], not"):
            tool(wrong)


def test_near_is_large_for_metric_networks_too(photos):
    network = build(replace(TINY, output="metric", max_depth=20.0))
    inverse = network.tool()(photos)
    distance = depth_tool(network, TINY.preprocess)(photos)
    assert distance.min() > 0 and distance.max() < 25
    np.testing.assert_allclose(inverse, 1 / np.maximum(distance, NEAREST * 20), rtol=1e-5)


def test_half_precision_is_near(photos):
    full, half = build(TINY).tool()(photos), build(TINY, jnp.bfloat16).tool()(photos)
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    assert np.linalg.norm(full - half) < 0.03 * np.linalg.norm(full)


def test_few_programs_serve_all_batches(photos):
    traced = []

    class Network(nnx.Module):
        def __call__(self, images):
            traced.append(images.shape)
            return images[..., 0]

    tool = depth_tool(Network(), TINY.preprocess)
    for count in (1, 2, 3, 3, 2, 1):
        assert len(tool(photos[:count])) == count
    assert traced == [(1, 20, 28, 3), (2, 20, 28, 3), (4, 20, 28, 3)]
