import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from skimage import data

from composer_jax.conditions import mask as module
from composer_jax.conditions.mask import Mask

pytestmark = pytest.mark.fast

SIZES = ((1, 1, 3), (1, 8, 3), (5, 3, 3), (21, 13, 3))  # few: JAX compiles for each
IMAGES = hnp.arrays(np.uint8, st.sampled_from(SIZES), fill=st.integers(0, 255))


@pytest.fixture(scope="module")
def mask():
    return Mask()


def one(batch):
    return {name: array[0] for name, array in batch.items()}


@settings(deadline=None, max_examples=50)
@given(IMAGES, st.data())
def test_any_image_with_any_mask(image, rest):
    mask = Mask()
    keep = rest.draw(hnp.arrays(np.bool_, image.shape[:2]))
    stored = one(mask.extract(image[None], {"mask": keep[None]}))
    value = np.asarray(mask.value(stored)["map"])
    assert value.shape == (*keep.shape, 4) and value.dtype == np.float32
    np.testing.assert_array_equal(value[..., 3], keep)
    np.testing.assert_allclose(value[..., :3], image / 255 * keep[..., None], atol=1e-6)
    score = mask.measure(stored, image)
    assert score == 1 if keep.any() else np.isnan(score)
    assert mask.render(stored).shape == image.shape
    fitted = mask.fit(stored, (6, 4))
    assert fitted["image"].shape == (6, 4, 3) and np.isin(fitted["keep"], (0, 255)).all()


def test_without_a_mask_the_hole_is_the_middle(mask):
    stored = mask.extract(np.zeros((2, 8, 12, 3), np.uint8))
    hole = np.zeros((8, 12), bool)
    hole[2:6, 3:9] = True
    np.testing.assert_array_equal(stored["keep"] == 0, np.stack([hole, hole]))
    assert mask.extract(np.zeros((1, 1, 1, 3), np.uint8))["keep"].shape == (1, 1, 1)


@pytest.mark.parametrize("scale", [True, 1, 1.0, np.uint8(255)])
def test_given_masks_of_any_kind(mask, scale):
    keep = np.zeros((1, 4, 4), np.asarray(scale).dtype)
    keep[0, 1] = scale
    stored = mask.extract(np.zeros((1, 4, 4, 3), np.uint8), {"mask": keep})
    np.testing.assert_array_equal(stored["keep"], np.where(keep, 255, 0))


def test_a_given_mask_of_another_size_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4, 5\)"):
        mask.extract(np.zeros((1, 4, 4, 3), np.uint8), {"mask": np.ones((1, 4, 5))})


def test_draw_makes_holes_of_many_sizes(mask):
    image = np.full((32, 48, 3), 0.7, np.float32)
    draw = jax.jit(jax.vmap(lambda key: mask.draw(key, None, image)["map"]))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 256)))
    assert drawn.shape == (256, 32, 48, 4) and drawn.dtype == np.float32
    keep = drawn[..., 3]
    assert np.isin(keep, (0, 1)).all()
    np.testing.assert_allclose(drawn[..., :3], np.repeat(0.7 * keep[..., None], 3, 3), rtol=1e-6)
    share = keep.mean(axis=(1, 2))
    assert share.std() > 0.15 and 0.4 < share.mean() < 0.8
    assert (share == 1).mean() < 0.02  # a hole nearly always
    again = draw(jax.random.split(jax.random.key(0), 256))
    np.testing.assert_array_equal(again, drawn)


@pytest.mark.parametrize("kind", [module._boxes, module._strokes, module._blob])
def test_every_kind_of_hole_is_in_proportion_to_the_image(kind):
    """The same numbers give the same hole at any size."""

    def holes(size):
        at = (np.arange(size, dtype=np.float32) + 0.5) / size
        u = np.random.default_rng(7).random((12, module.NUMBERS), np.float32)
        return np.asarray(jax.jit(jax.vmap(lambda u: kind(u, at[:, None], at[None, :])))(u))

    small, large = holes(32), holes(96)
    assert (small == large[:, 1::3, 1::3]).all()
    shares = small.mean(axis=(1, 2))
    assert shares.min() > 0 and shares.max() < 0.95 and len(np.unique(shares)) > 9


def boxes(u):
    for i in range(1 + int(4 * u[0])):
        (y, x), (tall, wide) = u[1 + 2 * i : 3 + 2 * i], 0.06 + 0.24 * u[9 + 2 * i : 11 + 2 * i]
        yield lambda at_y, at_x, y=y, x=x, tall=tall, wide=wide: np.maximum(
            abs(at_y - y) / tall, abs(at_x - x) / wide
        )


def strokes(u):
    for i in range(1 + int(3 * u[0])):
        steps = 0.7 * u[7 + 8 * i : 15 + 8 * i].reshape(4, 2) - 0.35
        points = [u[1 + 2 * i : 3 + 2 * i]]
        for turn in np.cumsum(steps, axis=0):
            points.append(np.clip(points[0] + turn, 0, 1))
        line = np.concatenate([np.linspace(a, b, 400) for a, b in itertools.pairwise(points)])
        yield (
            lambda at_y, at_x, line=line, width=0.03 + 0.07 * u[31 + i]: (
                np.hypot(at_y - line[:, 0, None, None], at_x - line[:, 1, None, None]).min(axis=0)
                / width
            )
        )


def blobs(u):
    def radius(at_y, at_x):
        away_y, away_x = (at_y - 0.15 - 0.7 * u[0]), (at_x - 0.15 - 0.7 * u[1])
        away_y, away_x = away_y / (0.15 + 0.25 * u[2]), away_x / (0.15 + 0.25 * u[3])
        angle, outline = np.arctan2(away_y, away_x), 1.0
        for order in range(1, 6):
            wave = (u[3 + order] - 0.5) / order
            outline = outline + wave * np.cos(order * angle + 2 * np.pi * u[8 + order])
        return np.hypot(away_y, away_x) / np.maximum(outline, 0.3)

    yield radius


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [(module._boxes, boxes), (module._strokes, strokes), (module._blob, blobs)],
)
def test_a_hole_is_what_lies_within_its_shapes(kind, shapes):
    """`shapes`: functions of places, below 1 inside one; its very border is left out."""
    at = (np.arange(40, dtype=np.float32) + 0.5) / 40
    drawn = jax.jit(lambda u: kind(u, at[:, None], at[None, :]))
    for u in np.random.default_rng(11).random((20, module.NUMBERS), np.float32):
        away = np.min([shape(at[:, None], at[None, :]) for shape in shapes(u)], axis=0)
        clear = abs(away - 1) > 0.02
        np.testing.assert_array_equal(np.asarray(drawn(u))[clear], (away < 1)[clear])


def test_holes_have_the_shapes_of_instances(mask):
    ids = np.zeros((32, 32), np.uint8)
    ids[2:10, 4:12], ids[20:26, 16:28] = 3, 7
    image = np.full((32, 32, 3), 0.5, np.float32)
    draw = jax.jit(jax.vmap(lambda key: mask.draw(key, {"ids": ids}, image)["map"][..., 3]))
    keep = np.asarray(draw(jax.random.split(jax.random.key(1), 200)))
    shapes = []
    for rows, columns in ((slice(1, 11), slice(3, 13)), (slice(19, 27), slice(15, 29))):
        widened = np.zeros((32, 32))
        widened[rows, columns] = 1
        shapes += [widened, 1 - widened]
    found = [sum((one == shape).all() for one in keep) for shape in shapes]
    assert min(found) >= 2 and 30 < sum(found) < 75  # a quarter of all, each instance, both ways


def test_image_and_mask_files(mask, tmp_path):
    image = data.chelsea()[:60:2, :80:2]
    keep = np.zeros(image.shape[:2], np.uint8)
    keep[10:] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(keep).save(tmp_path / "mask.png")
    Image.fromarray(keep).resize((80, 60), 0).save(tmp_path / "large.png")
    Image.fromarray(np.dstack([image, keep])).save(tmp_path / "rgba.png")
    Image.fromarray(image).save(tmp_path / "with:colon.png")
    pair, sources = f"{tmp_path}/image.png", []
    sources += [f"{pair}:{tmp_path}/mask.png", f"{pair}:{tmp_path}/large.png"]
    sources += [f"{tmp_path}/with:colon.png:{tmp_path}/mask.png", tmp_path / "rgba.png"]
    sources += [np.dstack([image, keep]), (image, keep > 0), {"image": image, "keep": keep}]
    for source in sources:
        stored = mask.parse(source)
        np.testing.assert_array_equal(stored["image"], image)
        np.testing.assert_array_equal(stored["keep"], keep)


def test_white_is_filled_anew_as_in_every_region(mask, tmp_path, caplog):
    image = data.chelsea()[:60:2, :80:2]
    region = np.zeros(image.shape[:2], np.uint8)
    region[10:] = 255
    painted = np.dstack([*[np.full_like(region, 255)] * 3, region])  # the rest is transparent
    for name, array in {"image": image, "region": region, "painted": painted}.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "region.npy", region > 0)
    files = [f"{tmp_path}/image.png:region={tmp_path}/{name}" for name in
             ("region.png", "painted.png", "region.npy")]  # fmt: skip
    arrays = [{"image": image, "region": array} for array in (region, painted, region / 255.0)]
    for source in (*files, *arrays):
        stored = mask.parse(source)
        np.testing.assert_array_equal(stored["image"], image)
        np.testing.assert_array_equal(stored["keep"], 255 - region)
    assert not caplog.records
    for old in (f"{tmp_path}/image.png:{tmp_path}/painted.png", (image, painted / 255.0)):
        caplog.clear()
        np.testing.assert_array_equal(mask.parse(old)["keep"], region)
        (record,) = caplog.records
        assert "white stays; write IMAGE:region=PNG" in record.getMessage()


def test_no_colour_comes_out_of_the_hole(mask):
    image = np.full((90, 120, 3), (10, 200, 30), np.uint8)
    keep = np.full(image.shape[:2], 255, np.uint8)
    image[20:60, 31:77], keep[20:60, 31:77] = (255, 0, 0), 0
    for size in ((32, 32), (41, 64), (200, 200)):
        fitted = mask.fit({"image": image, "keep": keep}, size)
        kept = fitted["keep"] > 127
        assert np.unique(fitted["image"][kept], axis=0).tolist() == [[10, 200, 30]]
        assert (fitted["image"][~kept] == (255, 0, 0)).all(axis=1).any()
    nothing = mask.fit({"image": image, "keep": 0 * keep}, (32, 32))
    assert not nothing["keep"].any()


def test_what_fits_no_mask_is_named(mask, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    for source, message in (
        (f"{tmp_path}/a.png:regoin={tmp_path}/a.png", "no 'regoin'.*did you mean 'region'"),
        ({"image": image}, "image is given; image and region"),
        ({"image": image, "hole": image}, "image, hole is given"),
        ({"image": image, "keep": np.full((8, 8), np.nan)}, "values from nan"),
        ({"image": image, "keep": np.full((8, 8), -1)}, "values from -1"),
        ({"image": image, "region": np.zeros((8, 8, 5))}, "shape"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            mask.parse(source)
        assert "\n" not in str(error.value)


def test_mistakes_are_named(mask, tmp_path, caplog):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 30, 3), np.uint8)).save(tmp_path / "wide.png")
    for source, message in {
        f"{tmp_path}/a.png": r"a\.png has no transparency; allowed: IMAGE:region=PNG",
        f"{tmp_path}/a.png:region=": "'' names no file",
        f":region={tmp_path}/a.png": "'' names no file",
        f"{tmp_path}/a.png:{tmp_path}/none.png": r"none\.png does not exist",
        f"{tmp_path}/none.png": r"none\.png does not exist",
        f"{tmp_path}/a.png:{tmp_path}/wide.png": r"mask has shape \(8, 30\), the image \(8, 8\)",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            mask.parse(source)
        assert "\n" not in str(error.value)
    assert not caplog.records
    with pytest.raises(ValueError, match="no transparency"):
        mask.parse(np.zeros((4, 4, 3), np.uint8))


def test_measure_sees_the_kept_part_only(mask):
    image = data.coffee()[::8, ::8]
    stored = one(mask.extract(image[None]))
    hole = stored["keep"] == 0
    other = image.copy()
    other[hole] = 0
    assert mask.measure(stored, other) == 1
    other[~hole] = np.clip(image[~hole].astype(int) - 51, 0, 255)
    changed = np.abs(other[~hole].astype(float) - image[~hole]).mean() / 255
    assert mask.measure(stored, other) == pytest.approx(1 - changed)


def test_render_shows_a_checkerboard_in_the_hole(mask):
    stored = one(mask.extract(np.zeros((1, 64, 64, 3), np.uint8)))
    shown = mask.render(stored)
    assert set(np.unique(shown[stored["keep"] == 0])) == {155, 205}
    assert not shown[stored["keep"] > 0].any()
