"""Whole or not at all: errors, kills and full disks leave what was there."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from composer_jax.utils import atomic
from composer_jax.utils.atomic import (
    WriteError,
    append_bytes,
    check_writable,
    new_file,
    new_folder,
    write_bytes,
    write_json,
    write_text,
)
from tests.disks import file_limit

pytestmark = pytest.mark.fast


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "deep/er/a.json", {"a": [1, "ä"]})
    write_text(tmp_path / "deep/b.txt", "ä\n")
    write_bytes(tmp_path / "deep/b.txt", b"new", sync=False)
    assert json.loads((tmp_path / "deep/er/a.json").read_text()) == {"a": [1, "ä"]}
    assert (tmp_path / "deep/b.txt").read_bytes() == b"new"
    assert names(tmp_path) == ["deep", "deep/b.txt", "deep/er", "deep/er/a.json"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_an_error_leaves_the_old_file_and_no_folder(tmp_path, old):
    path = tmp_path / "a/b/file"
    if old:
        write_bytes(path, old)
    before = names(tmp_path)
    with pytest.raises(KeyError), new_file(path) as part:
        part.write_bytes(b"half")
        raise KeyError
    assert names(tmp_path) == before
    assert not old or path.read_bytes() == old


@pytest.mark.parametrize("written", ["bytes", "numpy"])
def test_a_disk_that_is_full_is_named_with_its_file_system(tmp_path, written):
    path = tmp_path / "made/file"
    with file_limit(1000), pytest.raises(WriteError) as caught, new_file(path) as part:
        if written == "bytes":
            part.write_bytes(bytes(5000))
        else:  # whose error says neither the file nor why
            with part.open("wb") as file:
                np.save(file, np.zeros(5000))
    message = str(caught.value)
    assert str(path) in message and "file system /" in message and "MiB free" in message
    assert "\n" not in message and "Errno" not in message
    assert written == "numpy" or caught.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_what_is_appended_is_whole_or_not_there(tmp_path):
    path = tmp_path / "lines"
    append_bytes(path, b"first\n")
    with file_limit(1000), pytest.raises(WriteError, match="lines cannot be written: File too"):
        append_bytes(path, bytes(5000))
    append_bytes(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    write_text(tmp_path / "far/real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "far/real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far/real").read_text() == "new"


def test_a_device_is_written_to(capfd):
    write_text(atomic.Path("/dev/stdout"), "said")
    assert capfd.readouterr().out == "said"


def test_a_folder_comes_whole_or_not(tmp_path):
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "a/b") as new:
        (new / "half").write_text("x")
        raise ValueError("no")
    assert names(tmp_path) == []
    with new_folder(tmp_path / "a/b") as new:
        assert not (tmp_path / "a/b").exists()
        (new / "whole").write_text("x")
    assert names(tmp_path) == ["a", "a/b", "a/b/whole"]
    with pytest.raises(WriteError, match="a/b cannot be written"), new_folder(tmp_path / "a/b"):
        pass
    assert names(tmp_path) == ["a", "a/b", "a/b/whole"]


@pytest.mark.parametrize("moment", ["filling", "swapped"])
def test_what_a_killed_process_left_goes_and_the_old_folder_comes_back(tmp_path, moment):
    code = f"""
import os, sys
from pathlib import Path
from composer_jax.utils.atomic import new_folder
place = Path({str(tmp_path)!r}) / "model"
place.mkdir()
(place / "old").write_text("x")
rename, calls = os.rename, []
def killed(a, b):
    calls.append(a)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
    rename(a, b)
os.rename = killed
with new_folder(place, replace=True) as new:
    (new / "new").write_text("x")
    if {moment!r} == "filling":
        os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -9
    assert any(name.startswith(".model.") for name in names(tmp_path))
    assert (tmp_path / "model").exists() == (moment == "filling")
    write_text(tmp_path / "other", "x")
    assert names(tmp_path) == ["model", "model/old", "other"]


def test_what_a_living_process_writes_stays(tmp_path):
    with new_file(tmp_path / "a") as part:
        part.write_text("x")
        atomic._clean.cache_clear()
        write_text(tmp_path / "b", "x")
        assert part.exists()


def test_a_place_is_checked_without_a_trace(tmp_path):
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "a/b/c")
    check_writable(tmp_path)
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=r"file is a file"):
            check_writable(path)
    with pytest.raises(WriteError, match="too long"):
        check_writable(tmp_path / ("x" * 300))
    with pytest.raises(WriteError, match="/proc"):
        check_writable(atomic.Path("/proc/nothing/here"))
    assert names(tmp_path) == ["file"]
    assert os.listdir(tmp_path) == ["file"]
