"""Conditions measured on the very images they were taken from, and on others."""

import numpy as np
import pytest

import composer_jax as cj
from composer_jax.diffusion import use
from composer_jax.evaluation.obedience import obedience, pairs

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def scene():
    image = cj.open_source("scenes:1", size=64).batch([0])["image"][0]
    return image, cj.decompose(image, only=["sketch", "palette"])


def test_an_image_obeys_its_own_conditions_and_grey_does_not(scene):
    image, stored = scene
    images = np.stack([image, np.full_like(image, 128)])
    uses = {name: [use(value)] for name, value in stored.items()}
    uses["palette"].append(use(stored["palette"], negative=True))  # not asked for: not measured
    found = obedience(uses, images, {})
    assert [one.name for one in found] == ["sketch", "palette"]
    for one in found:
        assert one.scores[0] > 0.7 and one.scores[1] < 0.3
    np.testing.assert_array_equal(found[1].got[0], stored["palette"])


def test_a_palette_is_measured_in_its_region(scene):
    image, _ = scene
    half = np.zeros((4, 4))
    half[:, :2] = 1.0
    left = cj.decompose(image[:, :32], only=["palette"])["palette"]
    (one,) = obedience({"palette": [use(left, region=half)]}, image[None], {})
    (whole,) = obedience({"palette": [use(left)]}, image[None], {})
    assert one.scores[0] > 0.99 > whole.scores[0]


def test_what_cannot_be_measured_says_why(scene):
    (one,) = obedience({"depth": [use(np.zeros((64, 64), np.uint16))]}, scene[0][None], {})
    assert not len(one.scores) and "depth" in one.reason and one.got == [None]


def test_pairs_are_sorted_by_how_they_pull_apart():
    cosines = np.zeros((4, 3, 3))
    cosines[:, 0, 1] = cosines[:, 1, 0] = [0.5, 0.5, 0.1, 0.1]
    cosines[:, 1, 2] = cosines[:, 2, 1] = -0.4
    rows = pairs(["a", "b", "c"], cosines)
    assert rows[0] == ("b", "c", -0.4, -0.4, -0.4)
    np.testing.assert_allclose(rows[-1][2:], [0.5, 0.1, 0.3])
