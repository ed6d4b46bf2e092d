import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import data
from skimage.metrics import structural_similarity

from composer_jax.conditions.intensity import WEIGHTS, Intensity, ssim

pytestmark = pytest.mark.fast

SIZES = ((1, 1, 3), (1, 8, 3), (5, 3, 3), (21, 13, 3))  # few: JAX compiles for each
IMAGES = hnp.arrays(np.uint8, st.sampled_from(SIZES), fill=st.integers(0, 255))


@pytest.fixture(scope="module")
def intensity():
    return Intensity()


def test_presets_are_weights():
    assert WEIGHTS.shape[1] == 3 and len(np.unique(WEIGHTS, axis=0)) == len(WEIGHTS) > 6
    np.testing.assert_allclose(WEIGHTS.sum(axis=1), 1, atol=1e-6)
    assert WEIGHTS.min() >= 0


def test_default_is_the_grey_of_pillow(intensity):
    image = data.coffee()[::4, ::4]
    stored = intensity.extract(image[None])
    expected = np.asarray(Image.fromarray(image).convert("L"))
    assert abs(stored["map"][0].astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(stored["weights"], WEIGHTS[:1])


@settings(deadline=None, max_examples=50)
@given(IMAGES, st.integers(0, len(WEIGHTS) - 1))
def test_any_image_under_any_weights(image, index):
    intensity, given_weights = Intensity(), {"intensity": WEIGHTS[index : index + 1]}
    batch = intensity.extract(image[None], given_weights)
    stored = {name: array[0] for name, array in batch.items()}
    assert stored["map"].shape == image.shape[:2] and stored["map"].dtype == np.uint8
    value = np.asarray(intensity.value(stored)["map"])
    np.testing.assert_allclose(value[..., 0], image / 255 @ WEIGHTS[index], atol=0.5 / 255 + 1e-6)
    assert intensity.measure(stored, image) == pytest.approx(1)
    assert intensity.render(stored).shape == image.shape
    assert intensity.fit(stored, (7, 5))["map"].shape == (7, 5)


@pytest.mark.parametrize("weights", [[[0.5, 0.5, 0.5]], [[-1, 1, 1]], [[1, 0]], [1, 0, 0]])
def test_wrong_weights_are_refused(intensity, weights):
    with pytest.raises(ValueError, match="intensity: weights must be"):
        intensity.extract(np.zeros((1, 4, 4, 3), np.uint8), {"intensity": weights})


def test_draw_takes_every_preset_and_says_which(intensity):
    image = data.astronaut()[:16, :16].astype(np.float32) / 255
    drawn, weights = (
        np.asarray(jax.vmap(work)(jax.random.split(jax.random.key(3), 300)))
        for work in (lambda key: intensity.draw(key, None, image)["map"], intensity.draw_weights)
    )
    assert drawn.shape == (300, 16, 16, 1)
    assert len(np.unique(weights, axis=0)) == len(WEIGHTS)
    for one, weight in zip(drawn[:40], weights, strict=False):
        np.testing.assert_allclose(one[..., 0], image @ weight, atol=1e-5)


def test_parse_reads_colour_grey_rgba_and_16_bit(intensity, tmp_path):
    image = data.chelsea()[::8, ::8]
    expected = intensity.extract(image[None])["map"][0]
    Image.fromarray(image).save(tmp_path / "rgb.png")
    Image.fromarray(expected).save(tmp_path / "grey.png")
    Image.fromarray(expected.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "rgba.png")
    sources = [tmp_path / f"{name}.png" for name in ("rgb", "grey", "16", "rgba")]
    for source in (*sources, image, expected):
        np.testing.assert_array_equal(intensity.parse(source)["map"], expected)
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        intensity.parse(tmp_path / "text.png")


def test_ssim_equals_scikit_image():
    a = data.camera()[::4, ::4]
    for b in (a, np.roll(a, 3, axis=1), 255 - a, np.full_like(a, 90)):
        expected = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_measure_orders_likeness_and_uses_the_stored_weights(intensity):
    image = data.coffee()[::4, ::4]
    stored = {name: array[0] for name, array in intensity.extract(image[None]).items()}
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 20, image.shape), 0, 255)
    scores = [intensity.measure(stored, x.astype(np.uint8)) for x in (image, noisy, image[::-1])]
    assert scores[0] == pytest.approx(1) and scores[0] > scores[1] > scores[2]
    red = {
        name: a[0]
        for name, a in intensity.extract(image[None], {"intensity": WEIGHTS[3:4]}).items()
    }
    green_gone = image * np.array([1, 0, 0], np.uint8)
    assert intensity.measure(red, green_gone) == pytest.approx(1)
    assert intensity.measure(stored, green_gone) < 0.9
