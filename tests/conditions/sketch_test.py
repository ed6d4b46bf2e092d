import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import data

from composer_jax.conditions.contours import contours
from composer_jax.conditions.image import fit_map, load_image
from composer_jax.conditions.sketch import Sketch

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
SIZES = ((1, 1, 3), (1, 8, 3), (5, 3, 3), (21, 13, 3))  # few: JAX compiles for each
IMAGES = hnp.arrays(np.uint8, st.sampled_from(SIZES), fill=st.integers(0, 255))


@pytest.fixture(scope="module")
def sketch():
    return Sketch()


@pytest.fixture(scope="module")
def hed():
    """The real network (`make test` installs the package that ships its weights)."""
    from composer_jax.models.hed import load_hed

    return load_hed().tool()


def brightness(images):
    """An edge detector for tests: what is bright is likely a contour."""
    return images.mean(axis=3, dtype=np.float32) / 255


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


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 135])
def test_an_edge_of_any_direction_has_its_gradient(degrees):
    y, x = np.mgrid[:64, :64] - 31.5
    across = x * np.cos(np.radians(degrees)) + y * np.sin(np.radians(degrees))
    grey = 128 + 60 * np.tanh(across / 6)  # 10 grey levels a pixel where it is steepest
    image = np.rint(grey).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)
    assert Sketch(low=8.8, high=8.8).extract(image).any()
    assert not Sketch(low=11.0, high=11.0).extract(image).any()


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


def drawn(size=256):
    """Black lines on white paper, uint8 [size, size], and what they are as stored."""
    paper = np.full((size, size), 255, np.uint8)
    cv2.line(paper, (30, 40), (200, 220), 0, 1)
    cv2.circle(paper, (150, 90), 50, 0, 1)
    return paper, 255 - paper


@pytest.mark.parametrize(
    "kind",
    [
        lambda paper: paper,
        lambda paper: 255 - paper,
        lambda paper: np.repeat(paper[..., None], 3, axis=2),
        lambda paper: paper > 0,
        lambda paper: paper == 0,
        lambda paper: paper / 255.0,
        lambda paper: paper.astype(np.uint16) * 257,
        lambda paper: (paper == 0).astype(np.uint8),
        lambda paper: (paper > 0).astype(np.int64),
        lambda paper: paper.astype(np.int64)[..., None],
        lambda paper: np.dstack([0 * paper, 255 - paper]),  # black ink on nothing
        lambda paper: np.dstack([0 * paper + 255, 255 - paper]),  # white ink on nothing
        lambda paper: np.dstack([*[0 * paper + c for c in (9, 99, 200)], 255 - paper]) / 255.0,
        lambda paper: np.dstack([*[paper] * 3, 255 + 0 * paper]),
    ],
)
def test_a_drawing_is_one_drawing_as_any_kind_of_array(sketch, tmp_path, kind):
    paper, lines = drawn()
    array = kind(paper)
    np.testing.assert_array_equal(sketch.parse(array), lines)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(sketch.parse(tmp_path / "a.npy"), lines)
    if array.dtype == np.uint8 and array.max() == 255:
        Image.fromarray(array).save(tmp_path / "a.png")
        np.testing.assert_array_equal(sketch.parse(tmp_path / "a.png"), lines)


@pytest.mark.parametrize("ground", [0, 255])
def test_what_is_transparent_around_a_drawing_is_its_ground(sketch, ground):
    paper, lines = drawn()
    image = np.dstack([*[paper if ground else 255 - paper] * 3, np.full_like(paper, 255)])
    image[:30] = 255 - ground
    image[:30, :, 3] = 0
    np.testing.assert_array_equal(sketch.parse(image), lines)


@pytest.mark.parametrize("level", [0, 255])
def test_a_thing_on_nothing_has_its_outline(sketch, level):
    image = np.zeros((64, 64, 4), np.uint8)
    image[16:48, 20:40] = (level, level, level, 255)
    outline = np.zeros((64, 64), np.uint8)
    cv2.rectangle(outline, (20, 16), (39, 47), 255)
    assert near(sketch.parse(image), outline) == 1 and near(outline, sketch.parse(image)) == 1


def test_a_wide_drawing_in_black_and_white_becomes_thin_lines(sketch):
    paper = np.full((256, 256, 3), 255, np.uint8)
    cv2.line(paper, (40, 128), (216, 128), (0, 0, 0), 6)
    lines = sketch.parse(paper)
    assert np.count_nonzero(lines[:, 128]) == 1 and not lines[:120].any()


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


@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket"])
def test_the_learned_drawing_is_one_at_256_512_and_1024(sketch, hed, name):
    photos = [photo(name, size) for size in (256, 512, 1024)]
    drawings = [sketch.extract(image[None], tool=hed)[0] for image in photos]
    densities = [(drawing > 0).mean() for drawing in drawings]
    assert max(densities) / min(densities) < 1.5
    small = [fit_map(drawing, (256, 256), "lines") for drawing in drawings]
    for a in small:
        for b in small:
            assert near(a, b) > 0.85  # the same lines, within 2 of 256 px
    assert sketch.measure(drawings[1], photos[0], hed) > 0.5


def test_the_learned_drawing_has_things_and_no_texture(sketch, hed):
    """The cup's rim is closed; fur and the grain of wood, which Canny draws, are not there."""
    coffee, cat = data.coffee()[None], data.chelsea()[None]
    learned = sketch.extract(coffee, tool=hed)[0]
    _, fields, stats, _ = cv2.connectedComponentsWithStats((learned == 0).astype(np.uint8), None, 4)
    left, top, width, height, _ = stats[fields[60, 290]]
    assert 165 < left < left + width < 425 and 10 < top < top + height < 225
    wood, fur = np.s_[0, :120, 430:], np.s_[0, :80, 60:300]
    for image, texture in ((coffee, wood), (cat, fur)):
        canny, clean = ((sketch.extract(image, tool=tool)[texture] > 0) for tool in (None, hed))
        assert canny.mean() > 0.04 > 10 * clean.mean()


def test_flat_and_noisy_images_have_no_learned_contours(sketch, hed):
    noise = np.random.default_rng(0).integers(-2, 3, (64, 64, 3))
    for level in (0, 128, 255):
        image = np.clip(level + noise, 0, 255).astype(np.uint8)
        assert not sketch.extract(image[None], tool=hed).any()


def test_the_detector_is_the_one_that_was_asked_for(sketch):
    image = photo("coffee", 64)
    canny, learned = sketch.extract(image[None]), sketch.extract(image[None], tool=brightness)
    assert not np.array_equal(canny, learned)
    np.testing.assert_array_equal(Sketch("canny").extract(image[None], tool=brightness), canny)
    np.testing.assert_array_equal(Sketch("hed").extract(image[None], tool=brightness), learned)
    np.testing.assert_array_equal(sketch.parse(image, brightness), learned[0])
    assert sketch.measure(learned[0], image, brightness) > sketch.measure(learned[0], image) + 0.2
    with pytest.raises(ValueError, match="'hed' needs an edge detector passed as tool"):
        Sketch("hed").extract(image[None])
    with pytest.raises(ValueError, match=r"'hedd' \(did you mean 'hed'\?\); allowed: canny, hed"):
        Sketch("hedd")
    with pytest.raises(ValueError, match="low, high and sigma are Canny's"):
        Sketch("hed", low=1.0, high=2.0)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (lambda images: brightness(images)[..., None], r"the edge detector gave \[1, 8, 9, 1\]"),
        (lambda images: brightness(images)[:, :4], r"gave maps of \(4, 9\) for \(8, 9\)"),
        (lambda images: 255 * brightness(images), r"outside \[0, 1\]"),
        (lambda images: np.nan * brightness(images), r"outside \[0, 1\]"),
    ],
)
def test_a_detector_that_gives_something_else_is_refused(sketch, tool, message):
    with pytest.raises(ValueError, match=message):
        sketch.extract(np.full((1, 8, 9, 3), 200, np.uint8), tool=tool)


@settings(deadline=None, max_examples=60)
@given(IMAGES)
def test_any_probability_becomes_thin_lines(image):
    lines = Sketch().extract(image[None], tool=brightness)
    assert lines.shape == (1, *image.shape[:2]) and np.isin(lines, (0, 255)).all()


def ridges(size, *lines):
    """Probabilities [size, size] with a ridge along each polyline: (height, points in 1 / 256)."""
    drawn = np.zeros((size, size), np.float32)
    for height, points in lines:
        line = np.full((size, size), 255, np.uint8)
        cv2.polylines(line, [np.int32(np.asarray(points) * size / 256)], False, 0)
        away = cv2.distanceTransform(line, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) * 256 / size
        drawn = np.maximum(drawn, height * np.exp(-((away / 2.5) ** 2) / 2))
    return drawn


@pytest.mark.parametrize("size", [128, 256, 768])
def test_a_ridge_becomes_one_thin_line_without_spurs_and_crumbs(size):
    turn = np.linspace(0, 2 * np.pi, 100)
    ring = (0.9, 128 + 80 * np.stack([np.cos(turn), np.sin(turn)], axis=1))
    spur, crumb = (0.8, [(208, 128), (211, 128)]), (0.9, [(128, 128), (132, 128)])
    noise = np.random.default_rng(0).random((size, size), np.float32)
    lines = contours(0.9 * ridges(size, ring, spur, crumb) + 0.05 * noise)
    rows, columns = np.mgrid[:size, :size] * 256 / size - 128
    radius = np.hypot(rows, columns)
    assert np.all(np.abs(radius[lines] - 80) < 4)
    assert 0.8 < lines.sum() / (2 * np.pi * 80 * size / 256) < 1.2
    around = cv2.filter2D(lines.astype(np.uint8), -1, np.ones((3, 3)))
    assert (around[lines] >= 3).all()  # closed: nowhere an end


def test_a_faint_ridge_is_drawn_only_where_it_leads_to_a_likely_one():
    joined = [(0.9, [(20, 60), (120, 60)]), (0.3, [(120, 60), (230, 60)])]
    lines = contours(ridges(256, *joined, (0.3, [(20, 180), (230, 180)])))
    assert lines[58:63, 22:228].any(axis=0).all()
    assert not lines[150:].any()
