"""A shard counts when it and its notes are whole and of this call; equal examples, equal bytes."""

import json
import os

import pytest

from composer_jax.data.shards import (
    Damaged,
    notes_path,
    read_notes,
    shard_fault,
    shard_path,
    strange_files,
    write_shard,
)
from composer_jax.utils.atomic import WriteError
from tests.disks import file_limit

EXAMPLES = [bytes([i]) * 5000 for i in range(8)]
SKIPPED = [{"name": "a.png", "reason": "it is empty"}]


@pytest.fixture
def folder(tmp_path):
    """Two shards."""
    for shard in (0, 1):
        write_shard(tmp_path, shard, 2, EXAMPLES, SKIPPED, "call")
    return tmp_path


def faults(folder, **options):
    return [shard_fault(folder, shard, 2, "call", **options) for shard in (0, 1)]


def test_whole_shards_are_whole_and_their_bytes_equal(folder):
    assert faults(folder) == faults(folder, verify=True) == [None, None]
    assert shard_path(folder, 0, 2).read_bytes() == shard_path(folder, 1, 2).read_bytes()
    assert notes_path(folder, 0).read_bytes() == notes_path(folder, 1).read_bytes()
    assert read_notes(folder, 1)["skipped"] == SKIPPED and read_notes(folder, 1)["count"] == 8
    assert not strange_files(folder, 2) and len(strange_files(folder, 1)) == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"count": 8, "bytes": "9", "skipped": []}',
     '{"count": -1, "bytes": 9, "skipped": []}', '{"count": 8, "bytes": 9, "skipped": [{}]}',
     '{"count": 8, "bytes": 9, "skipped": [], "sha256": 5}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_notes_that_are_damaged_are_named(folder, text):
    notes_path(folder, 1).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Damaged, match=r"shards/00001\.json is damaged$"):
        read_notes(folder, 1)
    assert faults(folder) == [None, f"{notes_path(folder, 1)} is damaged"]


def test_damage_is_found_by_size_or_content(folder):
    path = shard_path(folder, 1, 2)
    content = path.read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        assert faults(folder)[1] == f"{path} is damaged ({kept} bytes instead of {len(content)})"
    path.write_bytes(content + b"x")
    assert "bytes instead of" in faults(folder)[1]
    for where in (0, 70, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[where] ^= 1
        path.write_bytes(flipped)
        assert faults(folder) == [None, None]
        assert faults(folder, verify=True)[1] == f"{path} is damaged (its content has changed)"
    path.unlink()
    assert faults(folder)[1] == f"{path} is missing"
    notes_path(folder, 1).unlink()
    assert faults(folder)[1] == ""


def test_notes_of_an_older_version_count_and_their_records_are_read(folder):
    for shard in (0, 1):
        notes = read_notes(folder, shard)
        old = {key: notes[key] for key in ("count", "bytes", "skipped")}
        notes_path(folder, shard).write_text(json.dumps(old))
    assert faults(folder) == faults(folder, verify=True) == [None, None]
    path = shard_path(folder, 1, 2)
    flipped = bytearray(path.read_bytes())
    flipped[100] ^= 1
    path.write_bytes(flipped)
    assert "hash mismatch" in faults(folder, verify=True)[1]


def test_notes_of_another_call_do_not_count(folder):
    write_shard(folder, 1, 2, EXAMPLES, SKIPPED, "other")
    assert faults(folder) == [None, f"{notes_path(folder, 1)} is of another call"]


def test_a_kill_between_a_shard_and_its_notes_leaves_no_shard_that_counts(folder, monkeypatch):
    def killed(path, values):
        raise KeyboardInterrupt

    monkeypatch.setattr("composer_jax.data.shards.write_json", killed)
    with pytest.raises(KeyboardInterrupt):  # other examples of the same size
        write_shard(folder, 1, 2, [*EXAMPLES[:7], EXAMPLES[0]], [], "call")
    assert faults(folder) == [None, ""]


def test_a_full_disk_leaves_what_was_there(folder):
    with file_limit(30_000), pytest.raises(WriteError, match=r"00001-of-00002 cannot be written"):
        write_shard(folder, 1, 2, [os.urandom(5000)] * 8, [], "call")
    assert faults(folder, verify=True) == [None, None]
    assert len(list(folder.iterdir())) == 3
