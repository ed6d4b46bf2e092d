"""The order of a run's examples: a pure function of (seed, position), at one cost everywhere.

Each epoch of a cache is a keyed permutation: a Feistel network on the smallest power of two that
holds all rows, applied again until it lands on a row (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). Its keys are a hash of (seed, cache, epoch). Nothing of a cache's size is
kept, and a run starts at its last step as quickly as at its first.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ORDER = 2  # the version that new runs use; a checkpoint without a version is of a run of order 1
ROUNDS = 24
PATTERN = 4096  # positions over which the proportions of a mix are exact
_GOLDEN, _64 = 0x9E3779B97F4A7C15, (1 << 64) - 1


class Order:
    """Which cache and which of its examples each position of a run is.

    `lengths`: examples of each cache; `weights`: their shares of a run, which sum to 1. Every block
    of `PATTERN` positions of a mix holds the same number of each, shuffled. Raises ValueError for
    an unknown `version`, or a weight too small for one position of a block.
    """

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[float], seed: int, version: int = ORDER
    ):
        if version not in (1, ORDER):
            raise ValueError(f"data order {version}: this version knows 1 and {ORDER}")
        self._lengths, self._seed, self._version = np.asarray(lengths, np.int64), seed, version
        ends = np.rint(np.cumsum(weights) * PATTERN).astype(np.int64)
        self._counts = np.diff(ends, prepend=0)
        if (self._counts < 1).any():
            raise ValueError(f"weights {list(weights)}: each must be at least 1 / {PATTERN} of all")
        self._pattern = lru_cache(maxsize=4)(self._shuffled)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the cache and row in it, int64 [N] each, of positions int64 [N]."""
        which, before = self._located(positions)
        rows = np.empty(len(positions), np.int64)
        shuffle = permuted if self._version > 1 else _permuted_1
        for number, length in enumerate(self._lengths.tolist()):
            mine = which == number
            if mine.any():
                epoch, index = np.divmod(before[mine], length)
                rows[mine] = shuffle(index, length, self._seed, number, epoch)
        return which, rows

    def _located(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each position: the cache, and how many positions before it are of that cache."""
        if len(self._lengths) == 1:
            return np.zeros(len(positions), np.int64), positions
        blocks, slots = np.divmod(positions, PATTERN)
        which, before = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            source, rank = self._pattern(block if self._version > 1 else 0)
            which[here] = source[slots[here]]
            before[here] = block * self._counts[which[here]] + rank[slots[here]]
        return which, before

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each slot of a block: the cache, and how many slots before it are of that cache."""
        source = np.repeat(np.arange(len(self._counts)), self._counts)
        key = [_key(self._seed, _64, block), 0] if self._version > 1 else [self._seed, PATTERN]
        np.random.Generator(np.random.Philox(key=key)).shuffle(source)
        rank = np.empty_like(source)
        for number, count in enumerate(self._counts):
            rank[source == number] = np.arange(count)
        return source, rank


def permuted(
    index: np.ndarray, count: int, seed: int, stream: int, epoch: np.ndarray
) -> np.ndarray:
    """int64 [N]: where the permutation of (seed, stream, epoch) takes each index, 0 to count - 1.

    `index` and `epoch` are int64 [N]; seed, stream and epoch are from 0 to 2^64 - 1.
    """
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = np.array([_key(seed, stream, one) for one in epochs.tolist()], np.uint64)[which]
    found, bits = index.astype(np.uint64), (count - 1).bit_length()
    left = np.arange(len(found) if bits else 0)
    while len(left):
        found[left] = _feistel(found[left], bits, keys[left])
        left = left[found[left] >= count]
    return found.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """A permutation of 0 to 2^bits - 1: its halves are mixed into each other in turn."""
    half = bits // 2
    low_mask, high_mask = np.uint64((1 << half) - 1), np.uint64((1 << bits - half) - 1)
    high, low = value >> np.uint64(half), value & low_mask
    for number in range(0, ROUNDS, 2):
        high = high ^ (_mixed(low, key, number) & high_mask)
        low = low ^ (_mixed(high, key, number + 1) & low_mask)
    return (high << np.uint64(half)) | low


def _mixed(value: np.ndarray, key: np.ndarray, number: int) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014) of a value, a key and a round."""
    x = value ^ (key + np.uint64((number + 1) * _GOLDEN & _64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, stream: int, epoch: int) -> int:
    digest = hashlib.blake2b(struct.pack("<3Q", seed, stream, epoch), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _permuted_1(
    index: np.ndarray, count: int, seed: int, stream: int, epoch: np.ndarray
) -> np.ndarray:
    """The permutations of order 1, which hardly shuffle: runs that began with them keep them."""
    from composer_jax.data.tensorflow import tf

    lib = tf()
    key = np.stack([np.full_like(epoch, seed), np.full_like(epoch, stream), epoch], axis=1)
    with lib.device("CPU"):
        return lib.raw_ops.RandomIndexShuffle(
            index=index, seed=key.astype(np.uint32), max_index=np.int64(count - 1), rounds=4
        ).numpy()
