"""Seeds of up to 63 bits: those that jax takes give jax's keys, and distinct ones differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.data.scenes import Scenes
from composer_jax.utils.seeds import key_of, seed_words

pytestmark = pytest.mark.fast
SEEDS = (0, 1, 2**20, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1)


def data(seed):
    return tuple(jax.random.key_data(key_of(jnp.asarray(seed_words(seed)))).tolist())


def test_a_seed_below_32_bits_has_the_key_that_jax_gives_it():
    for seed in SEEDS[:5]:
        assert data(seed) == tuple(jax.random.key_data(jax.random.key(np.uint32(seed))).tolist())


def test_distinct_seeds_have_distinct_keys():
    assert len(set(map(data, SEEDS))) == len(SEEDS)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1", None, float("nan")])
def test_what_is_no_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"^seed is .*; a whole number from 0 to 922337"):
        seed_words(seed)


def test_no_scene_is_both_trained_on_and_held_out():
    found = [
        Scenes(1, size=64, seed=seed, split=split).seed
        for seed in (*SEEDS, 2**20 + 1, 2**21, 2**63 - 1 - 2**20)
        for split in ("train", "test")
    ]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**64 for seed in found)
