import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import data

from composer_jax.conditions.image import fit_map, load_image
from composer_jax.conditions.sketch import Sketch

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
SIZES = ((1, 1, 3), (1, 8, 3), (5, 3, 3), (21, 13, 3))  # few: JAX compiles for each
IMAGES = hnp.arrays(np.uint8, st.sampled_from(SIZES), fill=st.integers(0, 255))


@pytest.fixture(scope="module")
def sketch():
    return Sketch()


def photo(name, size):
    return fit_map(load_image(getattr(data, name)()), (size, size), "area")


def near(lines, others):
    return (cv2.dilate(others, np.ones((5, 5), np.uint8))[lines > 0] > 0).mean()


def shapes():
    image = np.full((64, 64, 3), 200, np.uint8)
    image[16:48, 20:40] = (200, 60, 60)
    return image


@pytest.mark.parametrize("name", PHOTOS)
def test_one_photo_gives_one_drawing_at_256_512_and_1024(sketch, name):
    drawings = [sketch.extract(photo(name, size)[None])[0] for size in (256, 512, 1024)]
    densities = [(drawing > 0).mean() for drawing in drawings]
    assert max(densities) / min(densities) < 1.5
    small = [fit_map(drawing, (256, 256), "lines") for drawing in drawings]
    densities = [(drawing > 0).mean() for drawing in small]
    assert max(densities) / min(densities) < 1.5
    for a in small:
        for b in small:
            assert near(a, b) > 0.85  # the same lines, within 2 of 256 px


@settings(deadline=None, max_examples=60)
@given(IMAGES)
def test_any_image_gives_a_binary_map_of_its_size(image):
    lines = Sketch().extract(image[None])
    assert lines.shape == (1, *image.shape[:2]) and lines.dtype == np.uint8
    assert np.isin(lines, (0, 255)).all()
    value = Sketch().value(lines[0])["map"]
    assert value.shape == (*image.shape[:2], 1) and set(np.unique(value)) <= {0.0, 1.0}


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images_are_blank(sketch, level):
    noise = np.random.default_rng(0).integers(-1, 2, (64, 64, 3))
    image = np.clip(level + noise, 0, 255).astype(np.uint8)
    assert not sketch.extract(image[None]).any()


def test_a_box_is_drawn_as_its_thin_outline(sketch):
    lines = sketch.extract(shapes()[None])[0]
    outline = np.zeros((64, 64), np.uint8)
    cv2.rectangle(outline, (20, 16), (39, 47), 255)
    assert near(lines, outline) == 1 and near(outline, lines) == 1
    assert 0.8 < np.count_nonzero(lines) / np.count_nonzero(outline) < 1.3


def test_edges_between_equally_bright_colours_are_seen(sketch):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 0, 0), (0, 102, 0)  # equal under BT.601
    lines = sketch.extract(image[None])[0]
    assert (lines[:, 30:34] > 0).any(axis=1).all()


def test_thresholds_follow_contrast_unless_fixed(sketch):
    image = photo("coffee", 128)
    faint = (image * 0.4).astype(np.uint8)
    same, fainter = sketch.extract(np.stack([image, faint]))
    assert near(fainter, same) > 0.9 and near(same, fainter) > 0.9
    fixed = Sketch(low=4.0, high=10.0).extract(np.stack([image, faint]))
    assert (fixed[1] > 0).sum() < 0.8 * (fixed[0] > 0).sum()
    strict = Sketch(low=10.0, high=25.0).extract(image[None])
    assert 0 < (strict > 0).sum() < (fixed[0] > 0).sum()


@pytest.mark.parametrize(("low", "high"), [(1.0, None), (None, 1.0), (3.0, 2.0), (-1.0, 2.0)])
def test_thresholds_that_make_no_sense_are_refused(low, high):
    with pytest.raises(ValueError, match=r"sketch: .*low"):
        Sketch(low=low, high=high)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_what_render_shows_parse_reads(sketch, tmp_path, size):
    stored = sketch.extract(photo("coffee", size)[None])[0]
    shown = sketch.render(stored)
    Image.fromarray(shown).save(tmp_path / "white.png")
    Image.fromarray(255 - shown).save(tmp_path / "black.png")
    np.save(tmp_path / "a.npy", stored)
    for name in ("white.png", "black.png", "a.npy"):
        np.testing.assert_array_equal(sketch.parse(tmp_path / name), stored)
    np.testing.assert_array_equal(sketch.parse(stored), stored)
    assert not sketch.parse(np.full((9, 9, 3), 255, np.uint8)).any()


def test_a_drawing_by_hand_becomes_thin_lines(sketch):
    paper = np.full((300, 300, 3), 255, np.uint8)
    cv2.circle(paper, (150, 150), 90, (200, 30, 30), 7, cv2.LINE_AA)
    lines = sketch.parse(paper)
    circle = np.zeros((300, 300), np.uint8)
    cv2.circle(circle, (150, 150), 90, 255, 1)
    assert near(lines, circle) == 1 and near(circle, lines) > 0.98
    assert np.count_nonzero(lines) < 1.6 * np.count_nonzero(circle)
    transparent = np.dstack([np.zeros((300, 300, 3), np.uint8), 255 - paper[..., 1]])
    assert near(sketch.parse(transparent), circle) == 1


def test_a_photo_becomes_its_contours(sketch):
    for name in ("chelsea", "astronaut"):
        image = photo(name, 128)
        np.testing.assert_array_equal(sketch.parse(image), sketch.extract(image[None])[0])
    grey16 = photo("camera", 64)[..., 0].astype(np.uint16) * 257
    assert sketch.parse(grey16).shape == (64, 64)


def test_parse_names_what_is_wrong(sketch, tmp_path):
    (tmp_path / "text.png").write_text("no")
    for source, message in ((tmp_path / "text.png", "text.png"), (np.zeros(3), "shape")):
        with pytest.raises(ValueError, match=message):
            sketch.parse(source)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (512, 512)])
def test_fit_keeps_lines_and_gives_them_the_stroke_of_their_size(sketch, size):
    stored = np.zeros((256, 256), np.uint8)
    stored[128] = 255
    fitted = sketch.fit(stored, size)
    assert fitted.shape == size and np.isin(fitted, (0, 255)).all()
    assert (fitted > 0).any(axis=0).mean() > 0.98
    assert (fitted > 0).sum(axis=0).max() == max(1, min(size) // 256)


def test_measure_is_high_for_the_image_itself_and_zero_for_others(sketch):
    images = [photo(name, 128) for name in PHOTOS]
    wanted = sketch.extract(np.stack(images))
    own = [sketch.measure(w, image) for w, image in zip(wanted, images, strict=True)]
    other = [
        sketch.measure(w, image) for w, image in zip(wanted, images[1:] + images[:1], strict=True)
    ]
    assert min(own) > 0.25 and np.mean(own) > 0.45
    assert np.mean(other) < 0.1
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert abs(sketch.measure(wanted[0], noise)) < 0.1
    assert sketch.measure(wanted[0], np.zeros_like(noise)) == 0


def test_measure_leaves_empty_drawings_out(sketch):
    assert np.isnan(sketch.measure(np.zeros((64, 64), np.uint8), shapes()))


def test_measure_at_another_size(sketch):
    wanted = sketch.extract(photo("coins", 256)[None])[0]
    assert sketch.measure(wanted, photo("coins", 128)) > 0.3
