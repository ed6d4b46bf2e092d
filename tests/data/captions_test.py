"""Captions: what is made false stays a sentence, near to the true one."""

import re

import numpy as np
import pytest

from composer_jax.data.captions import altered
from composer_jax.data.scenes import EXCLUSIVE, TEST_SEED, describe
from composer_jax.evaluation.facts import stated

pytestmark = pytest.mark.fast


def test_one_word_becomes_another_of_its_kind():
    rng = np.random.default_rng(0)
    for i in range(500):
        text = describe(TEST_SEED, i)["caption"]
        false = altered(text, EXCLUSIVE, rng)
        assert false != text and len(stated(false).groups) == len(stated(text).groups)
        for kind in EXCLUSIVE:  # no word of a kind came or went
            either = rf"\b(?:{'|'.join(kind)})\b"
            words = [len(re.findall(either, one)) for one in (text, false)]
            assert words[0] == words[1], (text, false)


def test_words_are_exchanged_where_that_says_something_else():
    texts = [
        altered("a red cone left of a blue ball", (("red", "blue"),), np.random.default_rng(seed))
        for seed in range(40)
    ]
    assert set(texts) == {
        "a blue cone left of a red ball",  # both exchanged
        "a blue cone left of a blue ball",
        "a red cone left of a red ball",
    }
    same = "an orange ball and a red ball"  # the other way round it says the same
    texts = {altered(same, (("red", "orange"),), np.random.default_rng(s)) for s in range(40)}
    assert texts == {"a red ball and a red ball", "an orange ball and an orange ball"}
    kinds = (("red", "orange"), ("cone", "ball"))
    texts = {
        altered("an orange cone and a red ball", kinds, np.random.default_rng(s)) for s in range(80)
    }
    assert "a red cone and an orange ball" in texts  # articles follow


def test_articles_follow_and_other_texts_stay():
    kinds = (("orange", "red"),)
    rng = np.random.default_rng(0)
    assert altered("a red cone", kinds, rng) == "an orange cone"
    assert altered("than an orange cone", kinds, rng) == "than a red cone"
    assert altered("a photo of a cat", kinds, rng) == "a photo of a cat"
    assert altered("", kinds, rng) == ""
