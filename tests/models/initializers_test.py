"""What networks start from: drawn on the host, by seed, path and place alone, a part at a time."""

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_jax.models.blocks import ResnetBlock
from composer_jax.models.files import module_tensors
from composer_jax.models.initializers import (
    LATER,
    Start,
    described,
    initialised,
    lecun_normal,
    start_at_zero,
)
from composer_jax.models.unet import PRESETS, UNet

pytestmark = pytest.mark.fast

NORMAL = Start((7, 5, 6), np.dtype("float32"), scale=2.0)


@st.composite
def parts(draw):
    ends = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in NORMAL.shape]
    return tuple(slice(*pair) for pair in ends)


@settings(deadline=None)  # the first makes the table of quantiles
@given(parts())
def test_a_part_is_that_part_of_the_whole(index):
    tensor = NORMAL.drawn(3, "a.b")
    np.testing.assert_array_equal(tensor.part(index), tensor.read()[index])


def test_numbers_depend_on_seed_and_path():
    one = NORMAL.drawn(3, "a.b").read()
    np.testing.assert_array_equal(one, NORMAL.drawn(3, "a.b").read())
    for other in (NORMAL.drawn(4, "a.b"), NORMAL.drawn(3, "a.c"), NORMAL.drawn(31, ".b")):
        assert np.mean(other.read() == one) < 0.01


def test_numbers_are_normal_and_truncated():
    numbers = Start((300, 1000), np.dtype("float32"), scale=1.0).drawn(0, "x").read().ravel()
    assert 1.999 < np.abs(numbers).max() <= 2.0
    # a normal truncated at 2: deviation .8796, fourth moment 1.4159 (by its density)
    assert abs(numbers.mean()) < 0.01 and numbers.std() == pytest.approx(0.8796, rel=5e-3)
    assert np.mean(numbers**4) == pytest.approx(1.4159, rel=1e-2)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01


def test_kernels_have_the_variance_of_flax_s_own():
    ours = lecun_normal(LATER, (3, 3, 64, 200)).drawn(0, "kernel").read()
    flax = nnx.Conv(64, 200, (3, 3), rngs=nnx.Rngs(0)).kernel[...]
    assert ours.std() == pytest.approx((9 * 64) ** -0.5, rel=1e-2)
    assert ours.std() == pytest.approx(float(flax.std()), rel=1e-2)


def test_a_network_starts_as_it_is_described():
    networks = [initialised(described(UNet, PRESETS["tiny"]), seed) for seed in (5, 5, 6)]
    found, again, other = map(module_tensors, networks)
    for name, tensor in found.items():
        array = tensor.read()
        np.testing.assert_array_equal(array, again[name].read())
        if name.endswith("scale"):
            assert (array == 1.0).all()
        elif name.endswith("bias") or "conv2" in name or "proj_out" in name or "conv_out" in name:
            assert not array.any(), name
        else:
            wanted = np.prod(array.shape[:-1]) ** -0.5
            assert array.std() == pytest.approx(wanted, rel=0.2), name
            assert not np.array_equal(array, other[name].read())
    assert len(found) > 100
    start_at_zero(networks[0].conv_in.kernel)
    assert not np.asarray(networks[0].conv_in.kernel[...]).any()


def test_flax_s_own_construction_works_too():
    block = ResnetBlock(32, 64, 16, 8, 1e-5, dtype=None, rngs=nnx.Rngs(0))
    assert np.asarray(block.conv1.kernel[...]).std() == pytest.approx((9 * 32) ** -0.5, rel=0.1)
    assert not np.asarray(block.conv2.kernel[...]).any()
    assert (np.asarray(block.norm1.scale[...]) == 1.0).all()
