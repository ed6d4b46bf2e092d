"""The order of examples looks drawn by lot, at any length, from any step; old runs keep theirs."""

import numpy as np
import pytest

from composer_jax.data.order import PATTERN, Order, permuted
from composer_jax.data.pipeline import batches

LENGTHS = [24, 1_000, 10**6]
SEEDS = [0, 1, 2**32, 2**63 - 1]


def epoch_of(length, seed, epoch=0, version=2):
    """The rows of one epoch of one cache."""
    positions = epoch * length + np.arange(length)
    return Order([length], [1.0], seed, version)(positions)[1]


def pool_epoch(length, seed, epoch=0):
    return batches(np.arange(length), length, seed)(epoch)


def z(a, b):
    """Correlation in standard deviations of that of two random orders."""
    return np.corrcoef(a, b)[0, 1] * np.sqrt(len(a) - 1)


@pytest.mark.parametrize("order", [epoch_of, pool_epoch])
@pytest.mark.parametrize("length", LENGTHS)
def test_an_epoch_looks_drawn_by_lot(order, length):
    index = np.arange(length)
    found = [order(length, seed, epoch) for seed in SEEDS for epoch in (0, 1)]
    for rows in found:
        assert np.array_equal(np.sort(rows), index)
        assert np.sum(rows == index) < 8  # 1 on average
        assert abs(z(rows, index)) < 4.5
        assert abs(z(rows[1:], rows[:-1])) < 4.5
    for i, rows in enumerate(found):
        for other in found[:i]:  # epochs of one seed, and seeds that differ in one high bit
            assert abs(z(rows, other)) < 4.5 and np.sum(rows == other) < 10


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_a_batch_is_from_all_over_the_cache(length):
    rows = epoch_of(length, 0)[: length // 8 * 8].reshape(-1, 8) / length
    # of 8 numbers drawn from 0 to 1: deviation .2887 as a sample's, widest gap of the mean
    deviations = np.sqrt(rows.var(axis=1, ddof=1).mean())
    assert deviations == pytest.approx(1 / np.sqrt(12), abs=3 / np.sqrt(length))
    tenths = np.bincount((epoch_of(length, 0)[: length // 10] * 10) // length, minlength=10)
    expected = length / 100
    assert np.all(np.abs(tenths - expected) < 5 * np.sqrt(expected))


@pytest.mark.parametrize("length", [2, 3, 5, 24])
def test_every_permutation_of_few_examples_is_as_likely(length):
    epochs = 4000
    found = Order([length], [1.0], 7)(np.arange(epochs * length))[1].reshape(epochs, length)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(length), (epochs, 1)))
    fixed = np.sum(found == np.arange(length), axis=1)
    assert fixed.mean() == pytest.approx(1.0, abs=0.08) and fixed.var() < 1.15
    table = np.stack([np.bincount(column, minlength=length) for column in found.T])
    expected = epochs / length
    chi = np.sum((table - expected) ** 2) / expected / (length - 1) ** 2
    assert chi < {2: 8, 3: 4, 5: 2.5, 24: 1.4}[length]
    steps = np.bincount(np.diff(found, axis=1).ravel() % length, minlength=length)[1:]
    assert np.all(np.abs(steps / steps.mean() - 1) < 0.12)


def test_any_step_is_computed_by_itself():
    order = Order([10**9, 37], [0.9, 0.1], 5)
    for start in (0, 4000, 10**15):
        whole = order(start + np.arange(500))
        for part in (slice(0, 100), slice(250, 251), slice(251, 500)):
            for all_, some in zip(whole, order(start + np.arange(500)[part]), strict=True):
                np.testing.assert_array_equal(all_[part], some)


def test_each_cache_of_a_mix_has_every_example_once_an_epoch():
    lengths, weights = [50, 50, 7], [0.5, 0.3, 0.2]
    order = Order(lengths, weights, 3)
    which, rows = order(np.arange(4 * PATTERN))
    for number, length in enumerate(lengths):
        mine = rows[which == number]
        mine = mine[: len(mine) // length * length].reshape(-1, length)
        assert np.array_equal(np.sort(mine, axis=1), np.tile(np.arange(length), (len(mine), 1)))
        share = np.mean(which.reshape(4, PATTERN) == number, axis=1)
        np.testing.assert_allclose(share, weights[number], atol=1 / PATTERN)
    first, second = (rows[which == number][:50] for number in (0, 1))
    assert abs(z(first, second)) < 4.5  # caches of one length go in orders of their own


def test_the_caches_of_a_mix_are_spread_anew_in_every_block():
    which = [Order([9, 9], [0.7, 0.3], seed)(np.arange(8 * PATTERN))[0] for seed in (0, 1)]
    blocks = np.concatenate([one.reshape(8, PATTERN) for one in which])
    slots = np.arange(PATTERN)
    for i, block in enumerate(blocks):
        assert abs(z(block, slots)) < 4.5 and abs(z(block[1:], block[:-1])) < 4.5
        assert all(abs(z(block, other)) < 4.5 for other in blocks[:i])
    in_batches = blocks.reshape(-1, 64).sum(axis=1)
    assert in_batches.std() == pytest.approx(np.sqrt(64 * 0.21), rel=0.15)


def test_keys_do_not_run_into_each_other():
    """Seed, cache and epoch are hashed apart: no sum or shift of them is alike."""
    one = {"seed": 0, "stream": 0, "epoch": 0}
    keys = [one, one | {"seed": 1}, one | {"stream": 1}, one | {"epoch": 1}]
    keys += [one | {"seed": 2**32}, one | {"seed": 1, "stream": 1}, one | {"seed": 1, "epoch": 1}]
    index = np.arange(100)
    orders = {
        tuple(permuted(index, 100, key["seed"], key["stream"], np.full(100, key["epoch"])))
        for key in keys
    }
    assert len(orders) == len(keys)


def test_order_1_is_that_of_the_runs_that_began_with_it():
    """Numbers of version 0.1 of this package, which shuffled 24 examples hardly at all."""
    assert list(epoch_of(24, 0, version=1)) == [0, 1, 2, 11, *range(4, 11), 3, *range(12, 24)]
    which, rows = Order([24, 10], [0.75, 0.25], 3, 1)(np.arange(4090, 4102))
    assert list(which) == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert list(rows) == [14, 15, 22, 7, 3, 20, 6, 22, 23, 0, 5, 4]
    with pytest.raises(ValueError, match="data order 3: this version knows 1 and 2"):
        Order([1], [1.0], 0, 3)


def test_a_weight_too_small_for_a_block_is_refused():
    with pytest.raises(ValueError, match="at least 1 / 4096"):
        Order([5, 5], [0.99999, 0.00001], 0)
