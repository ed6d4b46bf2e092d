"""composer prepare: killed, shared and handed broken files, it ends in the same dataset."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from composer_jax.cli import main
from composer_jax.commands.prepare import share
from composer_jax.data.stream import Caches

ONLY = "--config.conditions=palette,caption"


def prepare(source, out, *options):
    return main(["prepare", str(source), "--out", str(out), ONLY, "--shard-size", "8", *options])


def words(source, out):
    """The same as a command of its own process."""
    code = "import sys; from composer_jax.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "prepare", source, "--out", str(out), ONLY,
            "--shard-size", "8"]  # fmt: skip


def whole(folder):
    """Every example of a finished cache."""
    cache = Caches(f"cache:{folder}")
    return cache.examples(range(len(cache)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, whole(a), whole(b))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty images, five kinds of files that are none, and a folder that is called as one."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        image = rng.integers(0, 256, (70 + i, 64, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
        (folder / f"{i:03d}.txt").write_text(f"image {i}")
    content = (folder / "000.jpg").read_bytes()
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "words.png").write_text("no image")
    flipped = bytearray((folder / "001.png").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "a folder.jpg").mkdir()
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return folder


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "whole"
    assert prepare(f"folder:{photos}", out) == 0
    return out


def test_broken_files_are_skipped_and_named(photos, prepared):
    skipped = [json.loads(line) for line in (prepared / "skipped.jsonl").read_text().splitlines()]
    names = {"empty.png", "cut.jpg", "words.png", "flipped.png", "huge.png"}
    assert {one["name"] for one in skipped} == names and all(one["reason"] for one in skipped)
    assert len(whole(prepared)["image"]) == 40


def test_what_was_found_broken_before_the_first_shard_is_named_too(photos, tmp_path):
    (tmp_path / "few").mkdir()
    for name in ("000.jpg", "words.png"):  # which conditions the source has is asked of them first
        (tmp_path / "few" / name).write_bytes((photos / name).read_bytes())
    assert main(["prepare", f"folder:{tmp_path / 'few'}", "--out", str(tmp_path / "cache")]) == 0
    named = (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in named] == ["words.png"]


def test_processes_share_the_work_and_end_in_one_dataset(photos, prepared, tmp_path, capsys):
    for index, told in ((1, "are still missing"), (2, "still missing"), (0, "40 examples")):
        known = {"COMPOSER_PROCESS": str(index), "COMPOSER_PROCESSES": "3"}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in known.items():
                patch.setenv(key, value)
            assert prepare(f"folder:{photos}", tmp_path / "shared") == 0
        assert told in capsys.readouterr().out
    same(tmp_path / "shared", prepared)


def test_kills_lose_only_the_shards_in_flight(photos, prepared, tmp_path):
    out = tmp_path / "killed"
    command = words(f"folder:{photos}", out)
    for shards in (1, 3):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((out / "shards").glob("*.json"))) < shards and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.json")}
        assert len(kept) >= shards
    assert prepare(f"folder:{photos}", out) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    for path in prepared.rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(prepared)).read_bytes(), path
    assert not list(out.rglob("*.part"))


def test_two_at_once_that_know_nothing_of_each_other_end_in_one_dataset(photos, prepared, tmp_path):
    out = tmp_path / "both"
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(words(f"folder:{photos}", out), **told) for _ in range(2)]
    for one in both:
        said, errors = one.communicate()
        assert one.returncode == 0 and "40 examples in 6 shards" in said, errors
    found, wanted = ({path.relative_to(folder) for path in folder.rglob("*")}
                     for folder in (out, prepared))  # fmt: skip
    assert found == wanted
    for name in (name for name in wanted if (out / name).is_file()):
        assert (out / name).read_bytes() == (prepared / name).read_bytes(), name


def test_a_shard_of_broken_files_alone_is_no_trouble(photos, tmp_path, capsys):
    only = tmp_path / "only"
    only.mkdir()
    for i in range(9):
        (only / f"{i}.png").touch()
    os.link(photos / "001.png", only / "z.png")
    assert prepare(f"folder:{only}", tmp_path / "out") == 0
    assert "1 examples in 2 shards; skipped 9" in capsys.readouterr().out
    assert len(whole(tmp_path / "out")["image"]) == 1
    at = Caches(f"cache:{tmp_path / 'out'}").batches(4, 0)
    assert at(0)["image"].shape == (4, 64, 64, 3)


def test_a_cache_of_maps_that_are_drawn_anew_stores_no_condition(tmp_path):
    words = ["--config", "scenes64:smoke", "--config.conditions=intensity,mask"]
    assert main(["prepare", "scenes:4", "--out", str(tmp_path / "cache"), *words]) == 0
    example = whole(tmp_path / "cache")
    assert example["stored"] == {} and example["image"].shape == (4, 64, 64, 3)


def test_files_beside_the_shards_are_made_again_where_they_can_be(
    prepared, photos, tmp_path, capsys
):
    out = tmp_path / "again"
    shutil.copytree(prepared, out)
    cases = [
        ("composer.json", "[]", "composer.json was damaged and is written anew"),
        ("composer.json", '{"format": 1', "composer.json was damaged and is written anew"),
        ("composer.json", None, "composer.json was damaged and is written anew"),
        ("dataset_info.json", "[]", "dataset_info.json did not fit the shards and is written anew"),
        ("features.json", "", "features.json did not fit the shards and is written anew"),
        ("skipped.jsonl", '{"na', "skipped.jsonl did not fit the shards and is written anew"),
        ("shards/00002.json", "{", "shards/00002.json is damaged; the shard is made anew"),
    ]
    for group in (cases[0::3], cases[1::3], cases[2::3]):
        for name, text, _ in group:
            (out / name).unlink() if text is None else (out / name).write_text(text)
        if group[0][1] == "[]":  # nothing is known of the call that an older version noted
            notes = json.loads((out / "shards/00000.json").read_text())
            (out / "shards/00000.json").write_text(json.dumps(notes | {"call": "another"}))
            assert prepare(f"folder:{photos}", out) == 2
            assert (
                "its shards may be of another call; give another --out" in capsys.readouterr().err
            )
            (out / "shards/00000.json").write_text(json.dumps(notes, indent=2) + "\n")
        assert prepare(f"folder:{photos}", out) == 0
        told = capsys.readouterr().out
        assert all(says in told for _, _, says in group), told
        for path in prepared.rglob("*.*"):
            assert path.read_bytes() == (out / path.relative_to(prepared)).read_bytes(), path


def test_a_whole_cache_is_not_written_to(photos, prepared):
    def times():
        return {path: path.stat().st_mtime_ns for path in (prepared, *prepared.rglob("*"))}

    before = times()
    assert prepare(f"folder:{photos}", prepared, "--verify") == 0
    assert times() == before  # which may be read-only


def test_a_source_without_one_usable_image_leaves_no_cache(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    out = tmp_path / "out"
    assert prepare(f"folder:{tmp_path / 'bad'}", out) == 2
    assert "no usable image; skipped 1" in capsys.readouterr().err and not out.exists()


def test_wrong_use_ends_in_one_line(photos, prepared, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a.txt").touch()
    for words, message in [
        (["folder:nowhere", "--out", tmp_path / "no"], "nowhere does not exist"),
        (["scene:9", "--out", tmp_path / "no"], "did you mean 'scenes'"),
        (["scenes:9", "--flip", "--out", tmp_path / "no"], "captions say left and right"),
        (["scenes:9", "--config", "scenes64_clip", "--out", tmp_path / "no"], "trains no composer"),
        ([f"folder:{photos}", "--config.conditions=depth", "--out", tmp_path / "no"],
         f"folder:{photos} cannot give depth: depth needs a depth map"),
        (["scenes:9", "--config", "ablations", "--out", tmp_path / "no"], "there are scenes64,"),
        (["scenes:9", "--shard-size", "0", "--out", tmp_path / "no"], "size: the value is 0"),
        (["scenes:9", ONLY, "--out", full], "exists and is no cache"),
        ([f"folder:{photos}", ONLY, "--out", prepared], "was made with shard_size = 8, now"),
        ([f"folder:{photos}", ONLY, "--crop", "random", "--shard-size", "8", "--out", prepared],
         "was made with crop = 'centre', now it is 'random'"),
    ]:  # fmt: skip
        assert main(["prepare", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and not (tmp_path / "no").exists(), error


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1)),
        ({"COMPOSER_PROCESS": "2", "COMPOSER_PROCESSES": "3"}, (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4",
          "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"JOB_COMPLETION_INDEX": "0", "COMPOSER_PROCESSES": "8"}, (0, 8)),
    ],
)  # fmt: skip
def test_every_launcher_tells_its_share(environment, wanted):
    assert share(environment) == wanted


def test_half_a_share_is_refused():
    with pytest.raises(ValueError, match="COMPOSER_PROCESS is '1', COMPOSER_PROCESSES is ''"):
        share({"COMPOSER_PROCESS": "1"})
    with pytest.raises(ValueError, match="0 to 2 is wanted"):
        share({"COMPOSER_PROCESS": "3", "COMPOSER_PROCESSES": "3"})
