"""Batches of caches: a pure order, no overlap between parts, the values that were prepared."""

import json
import shutil

import jax
import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.cli import main
from composer_jax.data.prepare import arrays_of
from composer_jax.data.sources import open_source
from composer_jax.data.stream import Caches, pattern
from composer_jax.data.tensorflow import tfds
from composer_jax.models.clip import Clip
from composer_jax.storage.models import BUNDLED

ONLY = "--config.conditions=palette,sketch,caption,depth,instances"


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of 24 and of 10 scenes, in shards of 8."""
    root = tmp_path_factory.mktemp("caches")
    for name, count, seed in (("a", 24, "0"), ("b", 10, "5")):
        options = ["--shard-size", "8", "--seed", seed, ONLY, "--out", str(root / name)]
        assert main(["prepare", f"scenes:{count}", *options]) == 0
    return root


def ids(tree):
    """Which example each row is."""
    return [image.tobytes() for image in tree["image"]]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_cache_holds_what_was_taken_apart(caches):
    source, cache = open_source("scenes:24", size=64), Caches(f"cache:{caches / 'a'}", size=64)
    wanted, found = source.batch(range(24)), cache.examples(range(24))
    np.testing.assert_array_equal(found["image"], wanted["image"])
    for name in ("palette", "sketch", "depth", "instances"):
        stored = conditions.get(name).extract(wanted["image"], wanted["given"])
        same(found["stored"][name], arrays_of(name, stored))
    assert found["moments"].dtype == np.float16 and found["moments"].shape == (24, 16, 16, 12)


def test_tfds_opens_it(caches):
    rows = tfds().builder_from_directory(str(caches / "a")).as_data_source(split="train")
    assert len(rows) == 24 and rows[3]["stored"]["depth"].dtype == np.uint16
    wanted = open_source("scenes:24", size=64).batch([3])
    assert rows[3]["stored"]["caption"]["text"].decode() == wanted["given"]["caption"][0]
    np.testing.assert_array_equal(rows[3]["image"], wanted["image"][0])


def test_the_order_is_a_function_of_seed_and_step(caches):
    cache = Caches(f"cache:{caches / 'a'}")
    at = cache.batches(8, seed=3)
    steps = [at(step) for step in range(7)]
    for step in (5, 2):
        same(cache.batches(8, seed=3)(step), steps[step])
        same(at(step), steps[step])
    same(at(3), steps[3])
    epochs = [sorted(one for s in range(e, e + 3) for one in ids(steps[s])) for e in (0, 3)]
    assert epochs[0] == epochs[1] and len(set(epochs[0])) == 24
    assert ids(steps[0]) != ids(steps[3])
    assert ids(cache.batches(8, seed=4)(0)) != ids(steps[0])
    at(10**12)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_of_an_epoch_never_overlap(caches, parts):
    cache = Caches(f"cache:{caches / 'a'}")
    seen = []
    for index in range(parts):
        at = cache.batches(24, seed=1, part=(index, parts))
        seen += ids(at(2))
    assert len(seen) == len(set(seen)) == 24
    assert seen == ids(cache.batches(24, seed=1)(2))
    with pytest.raises(ValueError, match="batch 24 is not a multiple of 5 parts"):
        cache.batches(24, 1, (0, 5))


def test_a_mix_keeps_its_proportions(caches):
    mix = Caches(f"0.75*cache:{caches / 'a'}+0.25*cache:{caches / 'b'}")
    of_b = set(ids(Caches(f"cache:{caches / 'b'}").examples(range(10))))
    at = mix.batches(64, seed=0)
    seen = [one for step in range(4) for one in ids(at(step))]
    share = sum(one in of_b for one in seen) / len(seen)
    assert share == pytest.approx(0.25, abs=0.08) and len(set(seen)) == 34
    same(mix.batches(64, seed=0)(2), at(2))
    source, rank, count = pattern((0.7, 0.3), 0)
    assert abs(count[0] / len(source) - 0.7) < 1e-3
    for number in (0, 1):
        np.testing.assert_array_equal(rank[source == number], np.arange(count[number]))


def test_caches_of_before_tokenizers_were_noted_are_asked_for_their_ids(caches, tmp_path):
    clip = Clip.load(BUNDLED / "clip")
    made_by = {"tokenizer": clip.tokenizer.fingerprint()}
    noted = Caches(f"cache:{caches / 'b'}")
    noted.check((), made_by)
    with pytest.raises(ValueError, match="prepared with tokenizer 'fast-1:"):
        noted.check((), {"tokenizer": "other"})
    old = tmp_path / "old"
    shutil.copytree(caches / "b", old)
    about = json.loads((old / "composer.json").read_text())
    assert about["made_by"].pop("tokenizer") == made_by["tokenizer"]
    (old / "composer.json").write_text(json.dumps(about))
    Caches(f"cache:{old}+cache:{caches / 'b'}").check((), made_by)  # they mix, and are asked
    cache = Caches(f"cache:{old}")
    cache.check_tokens(clip.tokenize)
    with pytest.raises(ValueError, match="10 captions that were looked at 10 have other tokens"):
        cache.check_tokens(lambda texts: clip.tokenize([f"not {text}" for text in texts]))
    again = ["--shard-size", "8", "--seed", "5", ONLY, "--out", str(old)]
    assert main(["prepare", "scenes:10", *again]) == 0


def test_wrong_sources_and_damage_are_named(caches, tmp_path):
    for text, message in [
        (f"cache:{tmp_path}", "is no cache; make one with composer prepare"),
        (f"cache:{caches / 'a'}+cache:{tmp_path}", "is no cache"),
        (f"0*cache:{caches / 'a'}", "weight 0 must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Caches(text)
    with pytest.raises(ValueError, match=r"holds images of 64 px, config.image_size is 128"):
        Caches(f"cache:{caches / 'a'}", size=128)
    with pytest.raises(ValueError, match="has no semantics; it has palette, sketch"):
        Caches(f"cache:{caches / 'a'}").check(("semantics",), {})
    with pytest.raises(ValueError, match=r"prepared with vae '\w+', the config names 'other'"):
        Caches(f"cache:{caches / 'a'}").check((), {"vae": "other"})
    broken = tmp_path / "broken"
    shutil.copytree(caches / "a", broken)
    shard = next(broken.glob("*00001-of-00003"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    at = Caches(f"cache:{broken}").batches(24, 0)
    with pytest.raises(ValueError, match=r"00001-of-00003 is damaged .*; remove .*00001\.json and"):
        for step in range(3):
            at(step)
    (broken / "shards" / "00001.json").unlink()
    assert main(["prepare", "scenes:24", "--shard-size", "8", ONLY, "--out", str(broken)]) == 0
    same(
        Caches(f"cache:{broken}").batches(24, 0)(0),
        Caches(f"cache:{caches / 'a'}").batches(24, 0)(0),
    )
    shard.unlink()
    with pytest.raises(ValueError, match="00001-of-00003 is missing"):
        Caches(f"cache:{broken}")
