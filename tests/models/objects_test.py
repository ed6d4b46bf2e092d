"""The object detector: what it sees in held-out scenes is what stands there."""

import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.conditions.instances import mean_iou
from composer_jax.data.sources import open_source
from composer_jax.evaluation.facts import FactReader
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.models.objects import ObjectConfig, _group
from composer_jax.storage.models import find_part, load_objects
from composer_jax.training.config import load_config

computed = pytest.mark.optimised  # much is

COUNT = 64


@pytest.fixture(scope="module")
def scenes():
    return open_source(f"scenes:{COUNT}", size=64, split="test").batch(range(COUNT))


@pytest.fixture(scope="module")
def detector():
    return load_objects(find_part("bundled", "objects"))


@computed
def test_the_bundled_detector_sees_every_object(scenes, detector):
    """On these 64 scenes; `configs/scenes64_objects.py` has the numbers of 1,024."""
    seen = detector.look()(scenes["image"])
    counts = [len(fact["objects"]) for fact in scenes["facts"]]
    assert np.mean([len(things) == n for (_, things), n in zip(seen, counts, strict=True)]) > 0.9
    ids = scenes["given"]["instances"]
    iou = [mean_iou(want, found) for want, (found, _) in zip(ids, seen, strict=True)]
    assert np.mean(iou) > 0.85


@computed
def test_captions_are_true_of_their_scenes_and_of_no_other(scenes, detector):
    reader, texts, images = FactReader(detector), scenes["given"]["caption"], scenes["image"]
    own = [reader.agreement(*pair) for pair in zip(texts, images, strict=True)]
    others = [reader.agreement(*pair) for pair in zip(texts, images[::-1], strict=True)]
    assert np.mean(own) > 0.93 and np.mean(others) < 0.5
    blank = np.full_like(images[0], 128)
    assert np.mean([reader.agreement(text, blank) for text in texts]) < 0.1
    assert np.isnan(reader.agreement("a photo of a cat", images[0]))


@computed
def test_shapes_are_surer_in_scenes_than_in_smeared_ones(scenes, detector):
    import cv2

    smeared = np.stack([cv2.GaussianBlur(image, (0, 0), 3) for image in scenes["image"]])
    reader = FactReader(detector)
    assert reader.certainty(scenes["image"]) > reader.certainty(smeared) + 0.03


@computed
def test_it_is_the_segmenter_of_instances(scenes):
    condition = conditions.get("instances")
    segmenter = scenes_judges()["segmenter"]
    stored = condition.extract(scenes["image"], scenes["given"])
    one = {key: array[0] for key, array in stored.items()}
    assert condition.measure(one, scenes["image"][0], segmenter) > 0.8


def test_votes_make_groups():
    random = np.random.default_rng(0)
    middles = np.array([[0.2, 0.3], [0.7, 0.6]])
    votes = np.repeat(middles, [40, 60], axis=0) + 0.01 * random.standard_normal((100, 2))
    ids = _group(votes.astype(np.float32), 64)
    assert {frozenset(ids[:40]), frozenset(ids[40:])} == {frozenset({1}), frozenset({2})}
    assert not _group(votes[:5], 64).any()  # too few for an object


def test_one_trains_and_loads(tmp_path):
    from composer_jax.commands.train import train

    train(load_config("scenes64_objects:smoke"), tmp_path)
    found = load_objects(find_part(tmp_path, "objects")).look()(np.zeros((2, 64, 64, 3), np.uint8))
    assert len(found) == 2 and found[0][0].shape == (64, 64)


def test_it_trains_from_scenes_alone(tmp_path):
    from composer_jax.commands.train import train

    with pytest.raises(ValueError, match="trains from scenes"):
        train(load_config("scenes64_objects:smoke", ["source=folder:."]), tmp_path / "run")


def test_config_survives_json_and_is_strict():
    config = ObjectConfig(("ball",), ("red", "blue"), ("small",))
    assert ObjectConfig.from_dict(config.to_dict()) == config and config.splits == [2, 4, 5]
    with pytest.raises(ValueError, match="no key 'width'"):
        ObjectConfig.from_dict({"width": 3})
