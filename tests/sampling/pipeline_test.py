"""One compiled program for every subset, and images that depend on seed and index alone."""

import numpy as np
import pytest

import composer_jax as cj


def test_toggling_conditions_never_recompiles(pipe):
    scene = cj.open_source("scenes:1", size=64).batch([0])
    given = {k: v[0] for k, v in scene["given"].items() if k != "caption"}
    stored = cj.decompose(
        scene["image"][0], given={**given, "caption": scene["given"]["caption"][0]},
        tools={"clip": pipe.clip},
    )  # fmt: skip
    assert set(stored) == set(pipe.names)
    rng = np.random.default_rng(0)
    pipe({"palette": stored["palette"]}, steps=2)
    before = pipe._program._cache_size()
    for _ in range(12):
        names = [name for name in pipe.names if rng.random() < 0.5] or ["sketch"]
        start = float(rng.uniform(0, 0.5))
        uses = {
            name: cj.use(stored[name], strength=float(rng.random()), window=(start, 1.0))
            for name in names
        }
        image = pipe(uses, steps=2, guidance=float(rng.uniform(1.5, 4)), seed=1)
        assert image.shape == (1, 64, 64, 3) and image.dtype == np.uint8
    assert pipe._program._cache_size() == before


def test_an_image_depends_on_seed_and_index_alone(pipe):
    given = {"palette": ["#d62828", "#003049"]}
    two = pipe(given, count=2, seed=3, steps=2)
    np.testing.assert_array_equal(two, pipe(given, count=2, seed=3, steps=2))
    one = pipe(given, count=1, seed=3, steps=2)
    assert np.max(np.abs(two[0].astype(int) - one[0].astype(int))) <= 1
    assert np.any(two[0] != two[1])


def test_regions_share_a_picture(pipe):
    left = np.zeros((64, 64), np.float32)
    left[:, :32] = 1.0
    image = pipe(
        {"palette": [cj.use(["#d62828"], region=left), cj.use(["#003049"], region=1 - left)]},
        steps=2,
    )
    assert image.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"colour": "red"}, {}, "colour"),
        ({"palette": "#zzz"}, {}, "#zzz"),
        ({}, {"solver": "eulr"}, "euler"),
        ({}, {"steps": 0}, "steps"),
        ({}, {"count": 0}, "at least 1"),
    ],
)
def test_mistakes_are_named(pipe, given, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(given, **{"steps": 2, **options})
