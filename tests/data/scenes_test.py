"""The built-in world: deterministic, true to its own words, exact in depth and ids."""

import numpy as np
import pytest

from composer_jax.data.scenes import COLOURS, MOST, SHAPES, Scenes, describe, render


@pytest.fixture(scope="module")
def batch():
    return Scenes(100, size=32).batch(range(32))


def test_shapes_and_ranges(batch):
    given = batch["given"]
    assert batch["image"].shape == (32, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert given["distance"].shape == given["instances"].shape == (32, 32, 32)
    assert np.all(given["distance"] > 0) and np.isinf(given["distance"]).any()
    assert given["instances"].min() == 0 and given["instances"].max() <= MOST


def test_a_scene_depends_on_seed_and_index_alone(batch):
    again = Scenes(7, size=32).batch([5, 3])
    np.testing.assert_array_equal(again["image"], batch["image"][[5, 3]])
    assert again["given"]["caption"] == [batch["given"]["caption"][i] for i in (5, 3)]
    held_out = Scenes(7, size=32, split="test").batch([5])
    assert np.any(held_out["image"] != again["image"][:1])


def test_every_object_is_seen_and_objects_stand_before_the_sky(batch):
    for ids, depth, facts in zip(
        batch["given"]["instances"], batch["given"]["distance"], batch["facts"], strict=True
    ):
        assert set(np.unique(ids)) - {0} <= set(range(1, len(facts["objects"]) + 1))
        assert np.all(np.isfinite(depth[ids > 0]))
    seen = sum(len(np.unique(ids)) - 1 for ids in batch["given"]["instances"])
    placed = sum(len(facts["objects"]) for facts in batch["facts"])
    assert seen >= 0.95 * placed


def test_captions_name_every_object_and_relations_are_true():
    for index in range(300):
        scene = describe(0, index)
        words = scene["caption"].split()
        for thing in scene["objects"]:
            assert thing["colour"] in words, scene["caption"]
        # a colour and a shape that occur once each tell where their object stands
        if len(scene["objects"]) == 2 and "left of" in scene["caption"]:
            before, after = scene["caption"].split(" left of ")
            first = [o for o in scene["objects"] if o["colour"] in before.split()]
            second = [o for o in scene["objects"] if o["colour"] in after.split()[:5]]
            if len(first) == len(second) == 1:
                assert first[0]["x"] < second[0]["x"], scene["caption"]


def test_the_world_has_all_its_shapes_and_colours():
    objects = [thing for i in range(400) for thing in describe(1, i)["objects"]]
    assert {thing["shape"] for thing in objects} == set(SHAPES) - {""}
    assert {thing["colour"] for thing in objects} == set(COLOURS)


def test_depth_of_a_ball_is_that_of_geometry():
    scene = describe(0, 0)
    arrays = scene["scene"]
    arrays["count"] = 1
    arrays["shape"][0] = 1
    arrays["position"][0] = (0.0, 1.0, 0.0)
    arrays["radius"][0] = 1.0
    arrays |= {"camera": np.array([0.0, 1.0, -5.0]), "turn": 0.0, "pitch": 0.0, "lens": 0.5}
    rendered = render([scene], 65)
    centre = rendered["depth"][0, 32, 32]
    assert abs(centre - 4.0) < 1e-2  # distance 5, radius 1
    share = (rendered["instances"][0] == 1).mean()
    apparent = 1.0 / np.sqrt(24.0) / 0.5  # tan of the ball's half angle, over the image plane's
    assert abs(share - np.pi * apparent**2 / 4) < 0.01
