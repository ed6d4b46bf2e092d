import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import data
from skimage.color import hsv2rgb, rgb2lab

from composer_jax.conditions.palette import (
    BINS,
    Palette,
    lab_from_rgb,
    nearest_codes,
    nearest_table,
)

pytestmark = pytest.mark.fast

IMAGES = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 19), st.integers(1, 19), st.just(3)),
    fill=st.integers(0, 255),
)


@pytest.fixture(scope="module")
def palette():
    return Palette()


@pytest.fixture(scope="module")
def reference():
    """rayleigh's codebook written down on its own: RGB, CIELab, smoothing weights at s = 10."""
    hues = [0, 0.0833, 0.166, 0.25, 0.333, 0.5, 0.56333, 0.666, 0.73, 0.803, 0.916]
    saturations = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1, 1, 1, 0.4, 0.4, 0.4]
    values = [1, 1, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36, 0.84, 0.68, 0.52]
    hsv = np.array([[h, s, v] for h in hues for s, v in zip(saturations, values, strict=True)])
    greys = np.repeat(np.arange(12, -1, -1)[:, None] / 12, 3, axis=1)
    rgb = np.concatenate([hsv2rgb(hsv), greys])
    lab = rgb2lab(rgb)
    weights = np.exp(-((lab[:, None] - lab[None]) ** 2).sum(-1) / 200)
    return rgb, lab, weights / weights.sum(1, keepdims=True)


def direct(image, lab):
    pixels = rgb2lab(image).reshape(-1, 3)
    codes = np.concatenate(
        [
            ((chunk[:, None] - lab[None]) ** 2).sum(-1).argmin(1)
            for chunk in np.array_split(pixels, 64)
        ]
    )
    return np.bincount(codes, minlength=len(lab)) / len(codes)


def test_codebook_equals_the_reference(palette, reference):
    rgb, lab, _ = reference
    assert palette.rgb.shape == (BINS, 3)
    np.testing.assert_allclose(palette.rgb, rgb, atol=1e-6)
    np.testing.assert_allclose(palette.lab, lab, atol=1e-3)


def test_lab_equals_scikit_image():
    rgb = np.random.default_rng(0).random((999, 3))
    np.testing.assert_allclose(lab_from_rgb(rgb), rgb2lab(rgb), atol=1e-4)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_photos_equal_the_direct_distance_matrix(palette, reference, name):
    image = getattr(data, name)()[::2, ::2]
    _, lab, weights = reference
    histogram = palette.extract(image[None])[0]
    expected = direct(image, lab)
    assert histogram.dtype == np.float32 and histogram.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(histogram, expected, atol=1e-4)
    smooth = weights @ expected
    smooth[smooth < 1e-5] = 0
    np.testing.assert_allclose(palette.value(histogram)["vector"], smooth, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(IMAGES)
def test_any_image_equals_the_direct_distance_matrix(image):
    palette = Palette()
    np.testing.assert_allclose(
        palette.extract(image[None])[0], direct(image, palette.lab), atol=1e-7
    )


def test_the_bundled_table_is_the_distance_matrix():
    lab, table = Palette().lab, nearest_table()
    assert table.shape == (256**3,) and table.max() < BINS
    codes = np.random.default_rng(1).integers(0, 256**3, 20_000)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8)
    squared = ((lab_from_rgb(colours / 255.0)[:, None] - lab[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(table[codes], squared.argmin(1))
    np.testing.assert_array_equal(nearest_codes(colours, lab), squared.argmin(1))


@pytest.mark.parametrize(
    "image", [np.zeros((1, 1, 3)), np.zeros((5, 3, 3)), np.full((2, 2, 3), 255)]
)
def test_one_colour_fills_one_bin(palette, image):
    histogram = palette.extract(image[None].astype(np.uint8))[0]
    assert histogram.max() == 1 and np.count_nonzero(histogram) == 1
    assert histogram[BINS - 1 if image.max() == 0 else BINS - 13] == 1


def test_grey_rgba_and_16_bit_files(palette, tmp_path):
    image = data.chelsea()[::4, ::4]
    Image.fromarray(image).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])).save(
        tmp_path / "rgba.png"
    )
    expected = palette.extract(image[None])[0]
    for source in (tmp_path / "rgb.png", str(tmp_path / "rgba.png"), image, image / 255.0):
        np.testing.assert_array_equal(palette.parse(source), expected)
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(tmp_path / "16.png")
    grey = palette.parse(tmp_path / "16.png")
    assert grey[: BINS - 13].sum() < 0.01  # greys only, up to codewords that are all but grey


def test_pixels_count_by_their_alpha(palette, tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[:2], image[2:4] = (255, 0, 0, 255), (0, 0, 255, 51)
    Image.fromarray(image).save(tmp_path / "a.png")
    for source in (image, image / 255.0, tmp_path / "a.png"):
        np.testing.assert_allclose(palette.parse(source), palette.parse("#f00:5,#00f:1"), atol=1e-6)
    grey = np.dstack([np.full((4, 4), 255), np.eye(4) * 255]).astype(np.uint8)
    np.testing.assert_array_equal(palette.parse(grey), palette.parse("white"))
    with pytest.raises(ValueError, match="transparent all over"):
        palette.parse(image * np.uint8([1, 1, 1, 0]))


def test_a_rendered_palette_is_read_back(palette):
    for histogram in (*np.eye(BINS), palette.extract(data.coffee()[None, ::8, ::8])[0]):
        np.testing.assert_allclose(palette.parse(palette.render(histogram)), histogram, atol=2**-14)


def test_hex_colours_and_weights(palette):
    weighted = palette.parse("#d62828:0.6,#003049:0.4")
    assert sorted(weighted[weighted > 0]) == pytest.approx([0.4, 0.6])
    red = palette.parse("#d62828")
    assert red.max() == 1 and weighted[red.argmax()] == pytest.approx(0.6)
    same = [["#d62828:3", "#003049:2"], " #d62828 : 6 , #003049:4", ("#D62828:0.6", "#003049:.4")]
    for text in same:
        np.testing.assert_allclose(palette.parse(text), weighted, atol=1e-7)
    np.testing.assert_array_equal(palette.parse("red,#fff"), palette.parse(["#ff0000", "white"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#zzz", "'#zzz' is not a colour; allowed: #rgb, #rrggbb or a CSS name"),
        ("#d62828,#12", "'#12' is not a colour"),
        ("rad", "'rad' is not a colour.*did you mean 'red'"),
        ("#fff:much", "'much' in '#fff:much' is not a weight"),
        ("#fff:-1", "'-1' in '#fff:-1' is not a weight"),
        ("#fff:nan", "not a weight"),
        ("#fff:0", "at least one weight"),
        ("", "'' is not a colour"),
        ("missing.png", r"missing\.png does not exist"),
        ("missing.npy", r"missing\.npy does not exist"),
        (np.ones(155), r"shape \(155,\).*allowed: .*156 numbers"),
        ({"#d62828": 0.6}, r"the palette is \{'#d62828': 0.6\}; allowed: colours \('#d62828:0.6,"),
        ([("#d62828", 0.6)], r"the palette is \[\('#d62828', 0.6\)\]; allowed: colours"),
        (None, "the palette is None; allowed: colours"),
        (np.full(156, -1.0), "not negative"),
        (np.zeros(156), "not all 0"),
        (np.full(156, np.nan), "not negative"),
    ],
)
def test_mistakes_are_named(palette, text, message):
    with pytest.raises(ValueError, match=message) as error:
        palette.parse(text)
    assert "\n" not in str(error.value)


def test_npy_round_trip(palette, tmp_path):
    histogram = palette.extract(data.coffee()[None, ::8, ::8])[0]
    np.save(tmp_path / "a.npy", histogram * 1000)
    np.testing.assert_allclose(palette.parse(tmp_path / "a.npy"), histogram, atol=1e-7)


def test_render_shows_shares(palette):
    swatches = palette.render(palette.parse("#ff0000:0.75,#0000ff:0.25"))
    assert swatches.shape == (64, 256, 3) and swatches.dtype == np.uint8
    red = (swatches[0] == (255, 0, 0)).all(axis=1).mean()
    assert red == 0.75 and (swatches[0, 0] == (255, 0, 0)).all()


def test_measure(palette):
    image = data.coffee()[::4, ::4]
    wanted = palette.extract(image[None])[0]
    assert palette.measure(wanted, image) == pytest.approx(1)
    assert palette.measure(wanted, image[::-1]) == pytest.approx(1)
    assert palette.measure(wanted, np.zeros_like(image)) < 0.3
    assert palette.measure(palette.parse("lime"), image) < 0.05


def test_draw_under_jit_and_vmap_is_the_value(palette):
    histograms = palette.extract(np.stack([data.coffee()[:64, :64], data.rocket()[:64, :64]]))
    keys, images = jax.random.split(jax.random.key(0), 2), np.zeros((2, 8, 8, 3), np.float32)
    drawn = jax.jit(jax.vmap(palette.draw))(keys, histograms, images)["vector"]
    assert drawn.shape == (2, BINS)
    for one, histogram in zip(drawn, histograms, strict=True):
        np.testing.assert_allclose(one, palette.value(histogram)["vector"], atol=1e-6)
    assert not np.any((drawn > 0) & (drawn < 1e-5))
