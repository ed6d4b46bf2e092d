"""Batches are a pure function of (seed, step)."""

import numpy as np

from composer_jax.data.pipeline import batches


def test_every_example_once_an_epoch_and_anew_from_any_step():
    pool = {"i": np.arange(10), "x": {"y": np.arange(10) * 2}}
    at = batches(pool, 4, seed=3)
    first = np.concatenate([at(step)["i"] for step in range(5)])
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert list(first[:10]) != list(first[10:])
    fresh = batches(pool, 4, seed=3)
    np.testing.assert_array_equal(fresh(4)["i"], at(4)["i"])
    np.testing.assert_array_equal(fresh(4)["x"]["y"], 2 * at(4)["i"])
    assert any(np.any(batches(pool, 4, seed=4)(s)["i"] != at(s)["i"]) for s in range(3))


def test_a_batch_may_exceed_the_data():
    assert len(batches({"i": np.arange(3)}, 8, seed=0)(2)["i"]) == 8
