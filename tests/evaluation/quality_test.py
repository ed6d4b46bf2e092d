"""Quality: distances are 0 for one distribution, grow with the shift, and have known values."""

import numpy as np
import pytest

from composer_jax.evaluation.quality import cmmd, diversity, effnet_features, frechet, kid, quality

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def features():
    random = np.random.default_rng(0)
    return random.standard_normal((400, 24)), random.standard_normal((400, 24))


@pytest.mark.parametrize("distance", [kid, cmmd, frechet])
def test_distances_grow_with_the_shift(features, distance):
    a, b = features
    values = [distance(a, b + shift) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert values == sorted(values)
    assert abs(values[0]) < 0.2 * values[2]  # Frechet's is biased: 0.7 for 400 of 24 numbers


def test_unbiased_kid_of_one_distribution_is_0_on_average():
    random = np.random.default_rng(1)
    values = [kid(*random.standard_normal((2, 50, 8))) for _ in range(200)]
    assert abs(np.mean(values)) < 3.0 * np.std(values) / np.sqrt(len(values))


def test_frechet_of_normals_is_the_closed_form():
    """Means 3 apart along an axis, variances 4 and 1 along it: 9 + (2 - 1)^2."""
    random = np.random.default_rng(2)
    a, b = random.standard_normal((2, 200_000, 2))
    assert frechet(a * [2, 1] + [3, 0], b) == pytest.approx(10.0, rel=0.01)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="equal numbers"):
        frechet(a[:10], b[:9])


def test_diversity_is_0_for_copies_and_1_for_what_is_orthogonal():
    eye = np.eye(4)
    assert diversity([eye, 2.0 * eye]) == pytest.approx(0.0)
    assert diversity([eye, np.roll(eye, 1, axis=0), np.roll(eye, 2, axis=0)]) == pytest.approx(1.0)
    assert np.isnan(diversity([eye]))


def test_a_table_knows_real_images_from_noise():
    random = np.random.default_rng(3)
    colours = random.integers(0, 256, (2, 64, 1, 1, 3), dtype=np.uint8)
    smooth, more = colours.repeat(8, 2).repeat(8, 3)
    noise = random.integers(0, 256, smooth.shape, dtype=np.uint8)
    noise[..., 0] //= 4
    pixels = lambda images: images.reshape(len(images), -1)[:, ::16] / 255.0 + 0.01  # noqa: E731
    sets = {"same": [more], "noise": [noise, noise[::-1]]}
    table = quality(smooth, sets, {"pixels": pixels})
    assert set(table) == {"real", "same", "noise"}
    for measure in ("KID x 1000, pixels", "CMMD, pixels", "FD-pixels"):
        assert abs(table["same"][measure]) < 0.5 * table["noise"][measure]
    assert table["noise"]["diversity, pixels"] > 0.05 and "diversity, pixels" not in table["same"]


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="two or more"):
        kid(np.ones((1, 3)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="two or more"):
        cmmd(np.ones((4, 2)), np.ones((4, 3)))


def test_effnet_is_an_extra():
    assert effnet_features() is None or callable(effnet_features())
