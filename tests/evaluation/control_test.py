"""Control: what obeys scores 1, and nothing that knows nothing of a condition scores at all."""

import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.data.sources import open_source
from composer_jax.evaluation.control import (
    HEAD,
    Control,
    Row,
    degenerate,
    extract_all,
    measure_control,
    remembering,
)
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.storage.models import find_part

pytestmark = pytest.mark.optimised  # much is computed

COUNT = 64  # of fewer scenes noise may have some depth in common with them


@pytest.fixture(scope="module")
def tools():
    from composer_jax.models.clip import Clip

    return {"clip": Clip.load(find_part("bundled", "clip")), **scenes_judges()}


@pytest.fixture(scope="module")
def scenes(tools):
    batch = open_source(f"scenes:{COUNT}", size=64, split="test").batch(range(COUNT))
    return batch["image"], extract_all(batch["image"], batch["given"], conditions.names(), tools)


def rows_of(images, sample, **more):
    """Rows where the floor is other scenes, which know nothing of a scene's condition."""
    rows = {"sample": [sample], "floor": [np.roll(images, 7, axis=0)], "oracle": [images]}
    return {**rows, **{kind: [some] for kind, some in more.items()}}


@pytest.mark.parametrize("name", conditions.names())
def test_the_image_itself_is_perfect_and_no_other_is(scenes, tools, name):
    """Blank, noise, mean, shifted and permuted images, the excess of each over the image's own."""
    images, stored = scenes
    wrong = degenerate(images) | {"black": np.zeros_like(images), "others": images[::-1].copy()}
    found = measure_control(name, stored, rows_of(images, images, **wrong), tools)
    if name == "mask":  # around the hole scenes are ground and sky, rolled or not
        assert found.normalised is None and found.rows["shifted"].score > 0.9
    else:
        assert found.normalised == 1.0 and found.interval == (1.0, 1.0)
    for kind in ("permuted", *wrong):
        if kind in found.rows:
            assert found.rows[kind].excess < 0.1 * found.rows["oracle"].excess, kind
    for kind in ("blank", "mean image", "black"):  # which are the same for every condition
        assert found.rows[kind].excess < 0.05 * found.rows["oracle"].excess, kind


def test_scores_are_means_over_seeds_and_intervals_hold_them(scenes):
    images, stored = scenes
    others = np.roll(images, 7, axis=0)
    rows = {"sample": [images, others], "floor": [others, others], "oracle": [images]}
    half = measure_control("palette", stored, rows, {})
    raw = {kind: row.score for kind, row in half.rows.items()}
    assert raw["sample"] == pytest.approx((raw["oracle"] + raw["floor"]) / 2)
    mixed = np.where(np.arange(COUNT)[:, None, None, None] % 3 == 0, others, images)
    found = measure_control("palette", stored, rows_of(images, mixed), {})
    low, high = found.interval
    assert 0.4 < low < found.normalised < high < 0.9
    assert len(found.cells()) == len(HEAD) and len(found.scores) == COUNT


def test_a_floor_below_chance_lifts_nothing(scenes):
    images, stored = scenes
    wrong = degenerate(images)
    rows = rows_of(images, wrong["blank"]) | {"floor": [wrong["shifted"]]}
    found = measure_control("intensity", stored, rows, {})
    assert found.rows["floor"].excess < -0.1
    assert found.normalised == pytest.approx(0.0, abs=0.01) and found.interval[1] < 0.01


def test_examples_that_cannot_be_measured_are_left_out_and_counted(scenes):
    images, stored = (some[:32] for some in scenes)  # one of the others has few lines of its own
    empty = np.zeros((64, 64), np.uint8)
    some = [{"sketch": empty}, *stored[1:]]
    found = measure_control("sketch", some, rows_of(images, images), {})
    assert found.left_out == 1 and found.normalised == pytest.approx(1.0)
    assert np.isnan(found.scores[0]) and np.isfinite(found.scores[1:]).all()
    nothing = [{"sketch": empty}] * len(images)
    found = measure_control("sketch", nothing, rows_of(images, images), {})
    assert found.left_out == len(images) and found.normalised is None and found.interval is None
    with pytest.raises(ValueError, match="depth needs"):
        measure_control("depth", stored, rows_of(images, images), {})


def test_a_measure_without_room_gives_no_normalised_number():
    found = Control({"sample": Row(0.93, 0.02, None)}, None, 0, np.zeros(1))
    assert found.normalised is None and found.cells()[:2] == ["-", "-"]


def test_what_is_measured_beside_is_perfect_for_the_image_itself(scenes, tools):
    images, stored = scenes
    perfect = {"palette": 0.0, "semantics": 1.0, "mask": 0.0}
    for name, value in perfect.items():
        found = measure_control(name, stored, rows_of(images, images), tools)
        assert found.beside, name
        for row in found.beside.values():
            assert row["sample"] == pytest.approx(value, abs=1e-6)
            assert name == "mask" or abs(row["permuted"] - value) > 0.3  # seams have a mean of 0


def test_a_judge_looks_at_an_image_once_and_at_many_at_a_time():
    seen = []

    def tool(images):
        seen.append([image.flat[0] for image in images])
        return images.mean(axis=(1, 2))

    images = np.arange(40, dtype=np.uint8)[:, None, None, None] + np.zeros((2, 2, 3), np.uint8)
    judge = remembering({"a": tool, "b": None})
    assert judge["b"] is None and remembering(judge)["a"] is judge["a"]
    judge["a"].look(images[:20])
    assert [len(set(batch)) for batch in seen] == [16, 4]
    for image in images[:20]:
        np.testing.assert_array_equal(judge["a"](image[None])[0], image[0, 0])
    judge["a"].look(images[10:])
    assert len(seen) == 4 and {number for batch in seen[2:] for number in batch} == set(
        range(20, 40)
    )
    np.testing.assert_array_equal(judge["a"](images)[:, 0], np.arange(40))
    assert len(seen) == 4
    with pytest.raises(ValueError, match="a tool gave 1 results for 2 images"):
        remembering({"a": lambda images: images[:1]})["a"].look(images[:2])
