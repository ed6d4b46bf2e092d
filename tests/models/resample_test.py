"""Resampling against OpenCV, which has PyTorch's conventions, and against numpy."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.models.resample import resample, resample_matrix

pytestmark = pytest.mark.fast

SIZES = [
    ((7, 5), (12, 9)),
    ((12, 9), (7, 5)),
    ((3, 8), (8, 3)),
    ((1, 4), (3, 1)),
    ((9, 9), (4, 20)),
]
FLAGS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@pytest.mark.parametrize("source, target", SIZES)
@pytest.mark.parametrize("kind", FLAGS)
def test_pixels_as_areas_are_opencvs(source, target, kind):
    image = np.random.default_rng(0).random((*source, 3), np.float32)
    wanted = cv2.resize(image, target[::-1], interpolation=FLAGS[kind])
    found = resample(jnp.asarray(image)[None], target, kind)[0]
    np.testing.assert_allclose(found, wanted, atol=5e-6)


@pytest.mark.parametrize("source, target", [(4, 9), (9, 4), (5, 5), (1, 3), (6, 1)])
def test_corners_stay_where_they_are(source, target):
    values = np.random.default_rng(1).random(source)
    wanted = np.interp(np.linspace(0, source - 1, target), np.arange(source), values)
    found = resample_matrix(source, target, "corners") @ values
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found[0] == values[0]


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "corners"])
def test_a_flat_image_stays_flat_and_its_own_size_changes_nothing(kind):
    np.testing.assert_allclose(resample_matrix(6, 17, kind).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(resample_matrix(6, 6, kind), np.eye(6))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'cubic'; allowed: bilinear, bicubic, corners"):
        resample_matrix(2, 3, "cubic")
