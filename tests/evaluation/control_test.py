"""Control: what obeys scores 1, what any image could score is taken away."""

import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.data.sources import open_source
from composer_jax.evaluation.control import HEAD, Control, extract_all, measure_control

COUNT = 24


@pytest.fixture(scope="module")
def scenes():
    batch = open_source(f"scenes:{COUNT}", size=64, split="test").batch(range(COUNT))
    names = ("sketch", "intensity", "palette", "mask", "depth")
    return batch["image"], extract_all(batch["image"], batch["given"], names, {})


def degenerate(images):
    random = np.random.default_rng(0)
    mean = images.mean(axis=0, keepdims=True).astype(np.uint8)
    return {
        "blank": np.full_like(images, 128),
        "mean image": np.repeat(mean, len(images), axis=0),
        "noise": random.integers(0, 256, images.shape, dtype=np.uint8),
    }


@pytest.mark.parametrize("name", ["sketch", "intensity", "palette"])
def test_the_image_itself_is_perfect_and_no_other_is(scenes, name):
    images, stored = scenes
    others = np.roll(images, 5, axis=0)  # samples that know nothing of the condition
    found = measure_control(name, stored, [images], [others], images, {})
    assert found.wanted == found.oracle > 0.7 and found.normalised == 1.0
    assert found.interval == (1.0, 1.0)
    assert abs(found.permuted - found.floor) < 0.12
    for kind, wrong in degenerate(images).items():
        row = measure_control(name, stored, [wrong], [others], images, {})
        assert row.normalised < 0.3, kind  # a blank has 0.28 of intensity, SSIM being kind to it


def test_scores_are_means_over_seeds_and_intervals_hold_them(scenes):
    images, stored = scenes
    others = np.roll(images, 5, axis=0)
    half = measure_control("palette", stored, [images, others], [others, others], images, {})
    assert half.normalised == pytest.approx(0.5)
    mixed = np.where(np.arange(COUNT)[:, None, None, None] % 3 == 0, others, images)
    found = measure_control("palette", stored, [mixed], [others], images, {})
    low, high = found.interval
    assert low < found.normalised < high and high - low > 0.05
    assert len(found.row()) == len(HEAD)


def test_examples_that_cannot_be_measured_are_left_out_and_counted(scenes):
    images, stored = scenes
    empty = np.zeros((64, 64), np.uint8)
    stored = [{"sketch": empty}, *stored[1:]]
    assert measure_control("sketch", stored, [images], [images], images, {}).left_out == 1
    nothing = [{"sketch": empty}] * COUNT
    found = measure_control("sketch", nothing, [images], [images], images, {})
    assert found.left_out == COUNT and np.isnan(found.wanted) and found.normalised is None
    with pytest.raises(ValueError, match="depth needs"):
        measure_control("depth", stored[1:], [images[1:]], [images[1:]], images[1:], {})


def test_a_measure_without_room_gives_no_normalised_number():
    found = Control(0.93, 0.9, 0.91, 0.95, (0.0, 1.0), 0)
    assert found.normalised is None and found.row()[4:6] == ["-", "-"]


def test_every_condition_has_a_judge(scenes):
    images, stored = scenes
    for name in ("sketch", "intensity", "palette", "mask"):
        judge = conditions.get(name).judge([row[name] for row in stored])
        assert judge(stored[0][name], images[0], None) > 0.7
