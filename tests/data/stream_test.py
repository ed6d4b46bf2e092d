"""Batches of caches: a pure order, no overlap between parts, the values that were prepared."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python import array_record_module as array_record

from composer_jax import conditions
from composer_jax.cli import main
from composer_jax.data.prepare import arrays_of
from composer_jax.data.sources import open_source
from composer_jax.data.stream import Caches
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


def equal_bytes(folder, other):
    """Every file of two caches."""
    names = [
        sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
        for one in (folder, other)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


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


def test_an_older_runs_order_goes_on(caches):
    cache = Caches(f"cache:{caches / 'a'}")
    every = ids(cache.examples(range(24)))
    old = cache.batches(24, seed=0, order=1)
    assert [every.index(one) for one in ids(old(0))][:5] == [0, 1, 2, 11, 4]
    new = [every.index(one) for one in ids(cache.batches(24, seed=0)(0))]
    assert sum(i == row for i, row in enumerate(new)) < 6


def test_python_ends_while_it_holds_batches(caches):
    code = (
        "import sys, time; from composer_jax.data.stream import Caches\n"
        "cache = Caches(sys.argv[1]); read = cache._parts[0].read\n"
        "cache._parts[0].read = lambda rows: (time.sleep(0.5), read(rows))[1]\n"  # always in one
        "at = cache.batches(8, 0); at(0); print('held')"
    )
    command = [sys.executable, "-c", code, f"cache:{caches / 'a'}"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "held\n", done.stderr


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


@pytest.fixture
def broken(caches, tmp_path):
    """A copy of the cache of 24, and its second shard."""
    shutil.copytree(caches / "a", tmp_path / "broken")
    return tmp_path / "broken", tmp_path / "broken" / "composer-train.array_record-00001-of-00003"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def strange(path):
    """As many bytes, and records, of something else."""
    size, new = path.stat().st_size, path.with_suffix(".other")
    writer = array_record.ArrayRecordWriter(str(new), "group_size:1")
    for _ in range(8):
        writer.write(b"no example")
    writer.close()
    path.write_bytes(new.read_bytes().ljust(size, b"\0")[:size])
    new.unlink()


SHARDS = {  # what happens to the second shard: what is said
    "cut": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        r"is damaged \(\d+ bytes instead of \d+\)",
    ),
    "halved": (lambda path: os.truncate(path, 65536), r"is damaged \(65536 bytes instead of \d+\)"),
    "emptied": (lambda path: os.truncate(path, 0), r"is damaged \(0 bytes instead of \d+\)"),
    "gone": (Path.unlink, "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is no file"),
    "flipped": (flip, r"is damaged \(.*hash mismatch.*\)"),
    "another": (strange, r"is damaged \(.*\)"),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_the_shard_that_failed_is_named_with_what_mends_it(caches, broken, kind):
    folder, shard = broken
    damage, says = SHARDS[kind]
    damage(shard)
    remedy = "; run its composer prepare again" + " with --verify" * (
        kind in ("flipped", "another")
    )
    for ask in (
        lambda cache: cache.examples(range(24)),
        lambda cache: [cache.batches(8, 0)(step) for step in range(3)],
    ):
        with pytest.raises(ValueError, match=f"00001-of-00003 {says}{remedy}$"):
            ask(Caches(f"cache:{folder}"))


def test_the_advice_ends_in_a_whole_cache(caches, broken, capsys):
    folder, shard = broken
    first, last = (shard.with_name(shard.name.replace("00001-", n)) for n in ("00000-", "00002-"))
    command = ["prepare", "scenes:24", "--shard-size", "8", ONLY, "--out", str(folder)]
    os.truncate(first, 65536)
    last.unlink()
    flip(shard)
    (folder / "shards" / "00009.json").write_text("{}")
    assert main(command) == 0
    told = capsys.readouterr().out
    assert told.count("is made anew") == 2 and "00000-of-00003 is damaged (65536 bytes" in told
    assert "00002-of-00003 is missing; the shard is made anew" in told
    assert "shards/00009.json belong to no shard of it and are not read" in told
    assert main([*command, "--verify"]) == 0
    told = capsys.readouterr().out
    assert "00001-of-00003 is damaged (its content has changed); the shard is made anew" in told
    (folder / "shards" / "00009.json").unlink()
    equal_bytes(folder, caches / "a")


def test_what_is_damaged_beside_the_shards_is_named_or_does_not_matter(caches, broken):
    folder, shard = broken
    (folder / "shards" / "00001.json").write_text('{"cou')
    same(Caches(f"cache:{folder}").examples(range(24)), Caches(f"cache:{caches / 'a'}").examples(
        range(24)))  # fmt: skip
    os.truncate(shard, shard.stat().st_size - 65536)
    with pytest.raises(ValueError, match=r"does not fit the shards; run its composer prepare"):
        Caches(f"cache:{folder}")
    for name in ("dataset_info.json", "composer.json"):
        for text in ("", "[]", "{}", "null", '{"splits": 3}', (folder / name).read_text()[:-9]):
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match=f"{name} is damaged; run its composer prepare"):
                Caches(f"cache:{folder}")
    with pytest.raises(ValueError, match=r"has examples 0 to 23, not \[24\]"):
        Caches(f"cache:{caches / 'a'}").examples([24])


def test_a_cache_that_moved_is_the_same_in_the_same_order(caches, broken):
    here, there = (Caches(f"cache:{folder}").batches(8, 3) for folder in (caches / "a", broken[0]))
    for step in range(4):
        same(here(step), there(step))
