"""Depth: exact where it is known, a network's where not, never invented."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.stats import spearmanr

from composer_jax.conditions import base
from composer_jax.conditions.depth import spearman
from composer_jax.data.sources import open_source

DEPTH = base.get("depth")
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def images(count, height=5, width=7):
    return np.zeros((count, height, width, 3), np.uint8)


def test_known_distance_becomes_inverse_depth_and_the_sky_zero():
    distance = np.float32([[[1.0, 2.0, 4.0, np.inf]], [[10.0, 5.0, 10.0, 5.0]]])
    stored = DEPTH.extract(images(2, 1, 4), {"distance": distance})
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored[0], [[65535, 32768, 16384, 0]])
    np.testing.assert_array_equal(stored[1], [[0, 65535, 0, 65535]])


def test_what_is_known_wins_over_the_network_and_without_both_there_is_no_fake():
    def network(batch):
        return np.broadcast_to(np.arange(7.0) - 3.0, batch.shape[:3])

    for name in ("depth", "distance"):
        known = DEPTH.extract(images(1), {name: np.ones((1, 5, 7))}, tool=network)
        assert np.all(known == 65535)
    seen = DEPTH.extract(images(1), {}, tool=network)
    np.testing.assert_array_equal(seen[0, 0], np.rint(np.arange(7) / 6 * 65535))
    with pytest.raises(
        ValueError, match=r"map given by the source.*passed as tool \(--depth-weights"
    ):
        DEPTH.extract(images(1))
    with pytest.raises(ValueError, match=r"the depth network gave \[1, 5\]"):
        DEPTH.extract(images(1), tool=lambda batch: np.zeros((1, 5)))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), size=SIZES)
def test_any_distance_is_normalised_and_nearer_is_larger(data, size):
    distance = data.draw(hnp.arrays(np.float32, size, elements=st.floats(0, 2.0**99, width=32)))
    stored = DEPTH.extract(images(1, *size), {"distance": distance[None]})[0]
    assert stored.shape == size and stored.dtype == np.uint16
    there = distance > 0
    order = np.argsort(distance[there])
    assert np.all(np.diff(stored[there][order].astype(int)) <= 0)
    value = DEPTH.value(stored)["map"]
    assert value.shape == (*size, 1) and value.dtype == np.float32
    assert value.min() >= 0.0 and value.max() <= 1.0


def test_draw_is_its_deterministic_twin_under_vmap():
    stored = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) * 2000
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = jax.jit(jax.vmap(DEPTH.draw))(keys, stored, np.zeros((2, 3, 4, 3), np.float32))
    np.testing.assert_allclose(drawn["map"][1], DEPTH.value(stored[1])["map"])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=SIZES, bits=st.sampled_from([8, 16]))
def test_a_grey_file_is_near_where_it_is_bright(tmp_path_factory, data, size, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    array = data.draw(hnp.arrays(dtype, size))
    path = tmp_path_factory.mktemp("depth") / "map.png"
    Image.fromarray(array).save(path)
    stored = DEPTH.parse(str(path))
    np.testing.assert_array_equal(stored, DEPTH.parse(array))
    low, high = int(array.min()), int(array.max())
    if high - low > 1e-4 * high:
        expected = (array.astype(float) - low) / (high - low) * 65535
        np.testing.assert_allclose(stored, expected, atol=0.51)
    else:
        assert np.all(stored == (65535 if high else 0))


def test_sixteen_bits_arrive_whole(tmp_path):
    array = np.arange(1000, 1100, dtype=np.uint16).reshape(10, 10)
    Image.fromarray(array).save(tmp_path / "map.png")
    assert len(np.unique(DEPTH.parse(tmp_path / "map.png"))) == 100


def test_what_is_rendered_is_read_back(tmp_path):
    stored = DEPTH.parse(np.random.default_rng(0).random((9, 11)))
    Image.fromarray(DEPTH.render(stored)).save(tmp_path / "map.png")
    again = DEPTH.parse(tmp_path / "map.png")
    assert np.abs(again.astype(int) - stored).max() <= 129
    Image.fromarray(DEPTH.to_png(stored)).save(tmp_path / "map.png")
    np.testing.assert_array_equal(DEPTH.parse(tmp_path / "map.png"), stored)
    np.save(tmp_path / "map.npy", stored)
    np.testing.assert_array_equal(DEPTH.parse(str(tmp_path / "map.npy")), stored)


def test_maps_of_distance_are_inverted():
    """Shades are turned around; of distances the inverse is taken, as where they are known."""
    near = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    near[0, :2] = 0, 255
    wide = near.astype(np.uint16) * 257
    for far in (255 - near, 1 - near / 255.0, 65535 - wide, np.dstack([255 - near] * 3)):
        np.testing.assert_array_equal(DEPTH.parse(far, invert=True), DEPTH.parse(near))
    distance = np.float32([[1.0, 2.0, 4.0, np.inf, np.nan, 0.0]])
    known = DEPTH.extract(images(1, 1, 6), {"distance": distance[None]})[0]
    np.testing.assert_array_equal(known, [[65535, 32768, 16384, 0, 0, 0]])
    np.testing.assert_array_equal(DEPTH.parse(distance, invert=True), known)
    millimetres = np.uint16([[1000, 2000, 4000, 0, 0, 0]])  # as depth cameras store them
    np.testing.assert_array_equal(DEPTH.parse(millimetres, invert=True), known)
    with pytest.raises(ValueError, match="no map of distance, in grey"):
        DEPTH.parse(np.random.default_rng(0).random((4, 4, 3)), invert=True)


@pytest.mark.parametrize(("white", "opaque"), [(1.0, 1.0), (255.0, 255.0), (80.0, 1.0)])
def test_floats_of_any_range_may_have_alpha(white, opaque):
    near = np.float32([[0.0, 0.25, 0.5, 1.0]]) * np.float32(white)
    alpha = np.float32([[opaque, opaque, 0.0, opaque]])
    stored = DEPTH.parse(np.dstack([near, alpha]))
    np.testing.assert_allclose(stored, [[0, 16384, 0, 65535]], atol=1)


@pytest.mark.parametrize("invert", [False, True])
def test_what_is_transparent_is_far(invert):
    shades = np.tile(np.arange(50, 250, 10, dtype=np.uint8), (4, 1))
    image = np.dstack([*[shades] * 3, np.full_like(shades, 255)])
    image[0] = 255 * (not invert), 255 * (not invert), 255 * (not invert), 0
    stored = DEPTH.parse(image, invert=invert)
    assert not stored[0].any()
    np.testing.assert_array_equal(stored[1:], DEPTH.parse(shades[1:], invert=invert))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16"])
def test_every_kind_of_grey_file_is_read(tmp_path, mode):
    ramp = np.tile(np.arange(0, 256, 5, np.uint8), (4, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257 if mode == "I;16" else ramp)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "map.png")
    stored = DEPTH.parse(tmp_path / "map.png")
    assert stored.shape == ramp.shape and stored[0, -1] == 65535 and stored[0, 0] == 0


def test_mistakes_end_in_one_clear_line(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("hello")
    np.save(tmp_path / "flat.npy", np.zeros(5))
    cases = {
        "photo.png is in colour; depth needs": tmp_path / "photo.png",
        "text.png": tmp_path / "text.png",
        "nowhere.png": tmp_path / "nowhere.png",
        r"flat.npy has shape \(5,\)": tmp_path / "flat.npy",
        "not finite": np.array([[1.0, np.nan]]),
        "holds <U1, not numbers": np.array([["a"]]),
    }
    for message, source in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            DEPTH.parse(str(source) if not isinstance(source, np.ndarray) else source)
        assert "\n" not in str(error.value)
    seen = DEPTH.parse(tmp_path / "photo.png", tool=lambda batch: batch[..., 0].astype(float))
    np.testing.assert_array_equal(seen, DEPTH.parse(colour[..., 0]))


def test_fit_keeps_the_map_and_brings_it_to_size():
    stored = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (20, 1))
    fitted = DEPTH.fit(stored, (10, 10))
    assert fitted.shape == (10, 10) and fitted.dtype == np.uint16
    assert np.all(np.diff(fitted[0].astype(int)) > 0)


def test_what_all_scenes_share_earns_nothing():
    batch = open_source("scenes:64", size=64).batch(range(64))
    stored = DEPTH.extract(batch["image"], batch["given"])
    mean = np.mean(stored, axis=0)

    def score(measure, found):
        seen = [one[None] / 65535.0 for one in found]
        pairs = zip(stored, batch["image"], seen, strict=True)
        return np.mean([measure(a, image, lambda _, f=f: f) for a, image, f in pairs])

    judge = DEPTH.judge(stored)
    assert score(DEPTH.measure, [mean] * 64) > 0.9  # the mean map looks like every scene
    assert abs(score(judge, np.roll(stored, 1, axis=0))) < 0.25
    assert score(judge, stored) > 0.99


def test_beside_it_stands_the_correlation_on_instances_alone():
    random = np.random.default_rng(2)
    stored, ids = random.integers(0, 65535, (4, 8, 9)), np.zeros((8, 9), np.uint8)
    ids[2:6, 3:7] = 1
    rows = [{"depth": one.astype(np.uint16), "instances": {"ids": ids}} for one in stored]
    (measure,) = DEPTH.beside(rows).values()
    seen = np.where(ids > 0, stored[1], random.integers(0, 65535, (8, 9)))
    seen.flat[:2] = 0, 65535  # so that stretching to the full range changes nothing
    image, tool = images(1, 8, 9)[0], lambda batch: seen[None]
    assert measure(rows[1], image, tool) == pytest.approx(1.0, abs=1e-3)
    assert DEPTH.judge(stored)(stored[1], image, tool) < 0.8
    assert np.isnan(measure({"depth": stored[1]}, image, tool))
    assert np.isnan(measure(rows[1] | {"instances": {"ids": 0 * ids}}, image, tool))


def test_measure_is_spearmans_correlation():
    random = np.random.default_rng(1)
    wanted = DEPTH.parse(random.random((8, 9)))
    image = images(1, 8, 9)[0]

    def measured(found):
        return DEPTH.measure(wanted, image, tool=lambda batch: found[None])

    assert measured(wanted**0.5) == pytest.approx(1.0)
    assert measured(-1.0 * wanted) == pytest.approx(-1.0)
    assert measured(np.full((8, 9), 3.0)) == 0.0
    other = random.integers(0, 5, (8, 9))  # with ties
    assert measured(other) == pytest.approx(spearmanr(wanted.ravel(), other.ravel())[0])
    assert measured(np.kron(wanted, np.ones((2, 2)))) == pytest.approx(1.0)  # of another size
    assert spearman(np.zeros((3, 3)), np.full((3, 3), 7.0)) == 1.0
    with pytest.raises(ValueError, match="needs a depth network"):
        DEPTH.measure(wanted, image)
