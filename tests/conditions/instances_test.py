"""Instances: ids survive, colours tell class and instance apart, a segmenter fills in."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFilter
from skimage import data

from composer_jax.conditions import base
from composer_jax.conditions.instances import CLASS_COLOURS, OnnxSegmenter, mean_iou

INSTANCES = base.get("instances")
SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))
ID_MAPS = SIZES.flatmap(lambda size: hnp.arrays(np.uint8, size, elements=st.integers(0, 31)))


def images(count, height, width):
    return np.zeros((count, height, width, 3), np.uint8)


def stored_of(ids, classes=()):
    table = np.zeros(32, np.int32)
    table[: len(classes)] = classes
    return {"ids": np.asarray(ids, np.uint8), "classes": table}


@settings(max_examples=40, deadline=None)
@given(ids=ID_MAPS)
def test_a_given_id_map_is_stored_as_it_is(ids):
    classes = np.arange(32)[None] * 2
    stored = INSTANCES.extract(
        images(1, *ids.shape), {"instances": ids[None].astype(np.int32), "classes": classes}
    )
    np.testing.assert_array_equal(stored["ids"][0], ids)
    np.testing.assert_array_equal(stored["classes"], classes)
    assert stored["ids"].dtype == np.uint8 and stored["classes"].dtype == np.int32


def test_masks_become_ids_and_too_many_instances_keep_the_largest():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :3], masks[1, 2:] = True, True
    stored = INSTANCES.extract(images(1, 4, 4), {"masks": [masks], "classes": [[0, 5, 7]]})
    assert stored["ids"][0, :, 0].tolist() == [1, 1, 2, 2]
    assert stored["classes"][0, :4].tolist() == [0, 5, 7, 0]
    many = np.repeat(np.arange(1000, 1040), np.arange(1, 41))[None, None]
    classes = np.zeros((1, 1040), int)
    classes[0, 1000:] = np.arange(40)
    stored = INSTANCES.extract(images(1, *many.shape[1:]), {"instances": many, "classes": classes})
    counts = np.bincount(stored["ids"].ravel(), minlength=32)
    assert counts[1:].tolist() == list(range(40, 9, -1)) and counts[0] == sum(range(1, 10))
    assert stored["classes"][0, 1:].tolist() == list(range(39, 8, -1))


def test_without_anything_to_take_them_from_there_is_a_clear_error():
    with pytest.raises(ValueError, match=r"an id map or masks given.*--segmenter"):
        INSTANCES.extract(images(1, 3, 3), {"classes": [[0, 1]]})
    with pytest.raises(ValueError, match=r"measuring instances needs a segmenter.*--segm"):
        INSTANCES.measure(stored_of([[1]]), images(1, 1, 1)[0])
    with pytest.raises(ValueError, match=r"the segmenter gave \[3, 3\]"):
        INSTANCES.extract(images(1, 3, 3), tool=lambda batch: np.zeros((3, 3), int))


def test_classes_stay_apart_under_any_jitter():
    assert CLASS_COLOURS.shape == (32, 3)
    apart = np.abs(CLASS_COLOURS[:, None] - CLASS_COLOURS[None]).max(axis=-1) + np.eye(32)
    assert apart.min() > 2 * 0.08
    assert CLASS_COLOURS.min() > 0.08 and CLASS_COLOURS.max() < 1 - 0.08


def test_the_drawn_map_jitters_instances_around_their_class_on_black():
    stored = stored_of([[0, 1, 2], [3, 3, 31]], [9, 4, 4, 0])
    image = np.zeros((2, 3, 3), np.float32)
    draw = jax.jit(lambda key: INSTANCES.draw(key, stored, image)["map"])
    first, second = draw(jax.random.key(1)), draw(jax.random.key(2))
    assert first.shape == (2, 3, 3) and first.dtype == np.float32
    for drawn in (first, second, INSTANCES.value(stored)["map"]):
        np.testing.assert_array_equal(drawn[0, 0], 0.0)
        np.testing.assert_array_equal(drawn[1, 0], drawn[1, 1])
        for (y, x), kind in {(0, 1): 4, (0, 2): 4, (1, 0): 0, (1, 2): 0}.items():
            assert np.abs(drawn[y, x] - CLASS_COLOURS[kind]).max() <= 0.08 + 1e-6
        assert np.abs(drawn[0, 1] - drawn[0, 2]).max() > 0.001
    assert np.abs(first - second).max() > 0.001
    np.testing.assert_array_equal(INSTANCES.value(stored)["map"], INSTANCES.value(stored)["map"])


@settings(max_examples=40, deadline=None)
@given(ids=ID_MAPS, seed=st.integers(0, 99))
def test_a_rendered_map_gives_back_ids_and_classes(ids, seed):
    stored = stored_of(ids, [0, *np.random.default_rng(seed).integers(0, 32, 31)])
    picture = INSTANCES.render(stored)
    expected = np.rint(np.asarray(INSTANCES.value(stored)["map"]) * 255)
    np.testing.assert_array_equal(picture, expected)
    again = INSTANCES.parse(picture)
    np.testing.assert_array_equal(again["ids"], ids)
    there = np.unique(ids)
    np.testing.assert_array_equal(
        again["classes"][there[1:] if 0 in there else there],
        stored["classes"][there[1:] if 0 in there else there],
    )


def test_every_instance_of_every_class_has_a_colour_of_its_own():
    ids = np.arange(32)[None]
    pictures = [INSTANCES.render(stored_of(ids, [kind] * 32))[0, 1:] for kind in range(32)]
    colours = np.concatenate(pictures)
    assert len(np.unique(colours, axis=0)) == 31 * 32
    assert np.all(np.ptp(colours.astype(int), axis=1) > 0)  # grey levels would be read as ids


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16"])
def test_files_with_small_ids_are_read_as_they_stand(tmp_path, mode):
    ids = np.arange(15, dtype=np.uint8).reshape(3, 5)
    image = Image.fromarray(ids.astype(np.uint16) if mode == "I;16" else ids)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "ids.png")
    np.testing.assert_array_equal(INSTANCES.parse(str(tmp_path / "ids.png"))["ids"], ids)


def test_large_ids_colours_and_transparency_are_numbered(tmp_path):
    Image.fromarray(np.uint16([[0, 300, 60000, 300]])).save(tmp_path / "wide.png")
    assert INSTANCES.parse(tmp_path / "wide.png")["ids"].tolist() == [[0, 1, 2, 1]]
    colours = np.uint8([[[0, 0, 0, 255], [255, 0, 0, 255], [0, 255, 0, 255], [9, 9, 1, 0]]])
    Image.fromarray(colours).save(tmp_path / "colours.png")
    assert INSTANCES.parse(tmp_path / "colours.png")["ids"].tolist() == [[0, 2, 1, 0]]
    np.save(tmp_path / "ids.npy", np.int64([[0, 7], [7, 5000]]))
    assert INSTANCES.parse(tmp_path / "ids.npy")["ids"].tolist() == [[0, 1], [1, 2]]
    assert INSTANCES.parse(np.array([[True, False]]))["ids"].tolist() == [[1, 0]]
    assert INSTANCES.parse(np.eye(3, dtype=bool)[:, None])["ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_ids_stand_in_any_channel_of_a_grey_array(dtype, channels):
    """Ids of 16 bits, too, which are no upper bytes; and nothing is where alpha is 0."""
    ids = (np.arange(48).reshape(6, 8) % 31).astype(dtype)
    image = np.repeat(ids[..., None], channels, axis=2)
    if channels % 2 == 0:
        image[..., -1] = True if dtype is bool else np.iinfo(dtype).max
        image[0, ..., -1] = 0
    if dtype is np.int64 and channels > 1:
        with pytest.raises(ValueError, match=r"int64 \[6, 8, .\]; allowed"):
            INSTANCES.parse(image)
        return
    ids[0] = 0 if channels % 2 == 0 else ids[0]
    np.testing.assert_array_equal(INSTANCES.parse(image)["ids"], ids)


def smoothings():
    """Two things on black, in grey and in colours, as editors smooth them."""
    ids = np.zeros((64, 64), np.uint8)
    ids[8:30, 8:40], ids[36:60, 20:60] = 120, 250
    colours = np.stack([ids, 255 - ids, ids // 2], axis=-1) * (ids > 0)[..., None]
    for image in (Image.fromarray(ids), Image.fromarray(colours)):
        yield image.filter(ImageFilter.GaussianBlur(1))
        yield image.resize((150, 150), Image.Resampling.BICUBIC)
        yield image.resize((40, 40), Image.Resampling.LANCZOS)
        yield image.resize((256, 256), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("smoothed", list(smoothings()))
def test_blends_along_borders_are_no_instances_and_said(tmp_path, smoothed, caplog):
    smoothed.save(tmp_path / "ids.png")
    stored = INSTANCES.parse(tmp_path / "ids.png")
    (record,) = caplog.records
    assert "ids.png" in record.getMessage() and "anti-aliasing" in record.getMessage()
    assert sorted(np.unique(stored["ids"])) == [0, 1, 2]
    scale = smoothed.height / 64
    for row, column in ((19, 24), (48, 40)):
        assert stored["ids"][int(row * scale), int(column * scale)] > 0
    sides, area = 2 * (22 + 32 + 24 + 40) * scale, (22 * 32 + 24 * 40) * scale**2
    assert abs(np.sum(stored["ids"] > 0) - area) < sides  # borders are right to a pixel


def test_thin_things_stay_instances(caplog):
    ids = np.zeros((32, 32), np.uint8)
    ids[4:12, 4:12], ids[20:28], ids[15], ids[:, 30], ids[2, 2:4] = 9, 20, 3, 5, 7
    np.testing.assert_array_equal(INSTANCES.parse(ids)["ids"], ids)
    ramp = np.tile(np.arange(31, dtype=np.uint8), (4, 1))
    np.testing.assert_array_equal(INSTANCES.parse(ramp)["ids"], ramp)
    assert not caplog.records


def test_a_photo_is_no_id_map_but_a_segmenter_takes_it(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("hello")
    cases = {
        "photo.png has 256 different colours": tmp_path / "photo.png",
        "text.png": tmp_path / "text.png",
        "nowhere.png": tmp_path / "nowhere.png",
        r"float64 \[2, 2\]; allowed": np.zeros((2, 2)),
        r"int64 \[1, 1\]; allowed": np.array([[-1]]),
        r"uint8 \[0, 3\]; allowed": np.zeros((0, 3), np.uint8),
    }
    for message, source in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            INSTANCES.parse(source)
        assert "\n" not in str(error.value)
    ids = np.tri(16, dtype=np.int32)[None]
    parsed = INSTANCES.parse(tmp_path / "photo.png", tool=lambda batch: ids)
    np.testing.assert_array_equal(parsed["ids"], ids[0])


def test_fit_keeps_ids_whole():
    stored = stored_of(np.kron(np.arange(16).reshape(4, 4), np.ones((5, 5))))
    fitted = INSTANCES.fit(stored, (4, 4))
    np.testing.assert_array_equal(fitted["ids"], np.arange(16).reshape(4, 4))
    np.testing.assert_array_equal(fitted["classes"], stored["classes"])


@settings(max_examples=40, deadline=None)
@given(ids=ID_MAPS, seed=st.integers(0, 99))
def test_mean_iou_ignores_the_names_of_instances(ids, seed):
    names = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(31)])
    assert mean_iou(ids, names[ids]) == pytest.approx(1.0)


def test_mean_iou_of_known_overlaps():
    wanted = np.int32([[1, 1, 1, 1, 2, 2, 0, 0]])
    found = np.int32([[5, 5, 5, 0, 0, 3, 3, 3]])
    assert mean_iou(wanted, found) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert mean_iou(wanted, np.where(found == 5, 5, 0)) == pytest.approx(3 / 8)
    assert mean_iou(wanted, 0 * wanted) == 0.0
    assert mean_iou(0 * wanted, 0 * wanted) == 1.0 and mean_iou(0 * wanted, found) == 0.0
    image = images(1, 1, 8)[0]
    score = INSTANCES.measure(stored_of(wanted), image, tool=lambda batch: found[None])
    assert score == pytest.approx(0.5)


class BrightnessSession:
    """As onnxruntime's session of a network that takes bright pixels for salient."""

    def get_inputs(self):
        return [SimpleNamespace(name="input.1", shape=["batch", 3, 32, 48])]

    def run(self, outputs, inputs):
        (pixels,) = inputs.values()
        assert list(inputs) == ["input.1"] and outputs is None
        assert pixels.shape == (1, 3, 32, 48) and pixels.dtype == np.float32
        assert pixels.flags["C_CONTIGUOUS"]
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        rgb = pixels[0] * std[:, None, None] + mean[:, None, None]
        assert rgb.min() > -1e-5 and rgb.max() < 1 + 1e-5
        return [rgb.mean(axis=0)[None, None], np.zeros((1, 1, 32, 48))]


def test_the_segmenter_makes_instances_of_connected_salient_pixels():
    image = np.full((64, 96, 3), 5, np.uint8)
    image[5:15, 10:30] = 255  # 200 pixels
    image[30:60, 50:90] = 200  # 1200 pixels, the larger
    image[40, 2] = 255  # too small
    ids = OnnxSegmenter("", session=BrightnessSession())(image[None])[0]
    assert ids.shape == (64, 96) and set(np.unique(ids)) == {0, 1, 2}
    assert ids[45, 70] == 1 and ids[10, 20] == 2 and ids[40, 2] == 0
    assert abs(np.sum(ids == 1) - 1200) < 120 and abs(np.sum(ids == 2) - 200) < 60
    assert not OnnxSegmenter("", session=BrightnessSession())(np.zeros_like(image)[None]).any()


def test_u2netp_finds_the_cup_and_the_rocket():
    """A real salient-object network (`make test` installs the package that ships it)."""
    (package,) = importlib.util.find_spec("rembg").submodule_search_locations
    segmenter = OnnxSegmenter(Path(package) / "u2netp.onnx")
    photo = data.coffee()
    cup, rocket = (INSTANCES.extract(p[None], tool=segmenter) for p in (photo, data.rocket()))
    height, width = cup["ids"].shape[1:]
    y, x = np.mgrid[:height, :width]
    saucer = ((y - 0.505 * height) / (0.465 * height)) ** 2 + ((x - 0.46 * width) / 205) ** 2 < 1
    found = cup["ids"][0] > 0
    assert (found & saucer).sum() / (found | saucer).sum() > 0.85
    standing = rocket["ids"][0] > 0
    rows, columns = np.nonzero(standing)
    assert np.ptp(rows) > 6 * np.ptp(columns) and abs(columns.mean() / 640 - 0.5) < 0.05
    assert INSTANCES.measure(jax.tree.map(lambda a: a[0], cup), photo, segmenter) > 0.99
    other = INSTANCES.measure(jax.tree.map(lambda a: a[0], cup), photo[:, ::-1], segmenter)
    assert other < 0.9


def test_the_segmenters_mistakes_are_clear(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"net\.onnx does not exist"):
        OnnxSegmenter(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes(b"no network")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'composer-jax\[segment\]'"):
        OnnxSegmenter(tmp_path / "net.onnx")

    def refuse(*args, **kwargs):
        raise RuntimeError("INVALID_PROTOBUF\nand more")

    broken = SimpleNamespace(InferenceSession=refuse)
    monkeypatch.setitem(sys.modules, "onnxruntime", broken)
    with pytest.raises(ValueError, match=r"net\.onnx is no ONNX network") as error:
        OnnxSegmenter(tmp_path / "net.onnx")
    assert "\n" not in str(error.value)
    text_model = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="ids", shape=[1, 77])])
    with pytest.raises(ValueError, match=r"\[1, 3, S, S\] is wanted"):
        OnnxSegmenter("net.onnx", session=text_model)
