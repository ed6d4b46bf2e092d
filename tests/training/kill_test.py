"""kill -9 at any moment, a full disk, damaged checkpoints: nothing is lost but the last steps."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training import toy

pytestmark = [pytest.mark.mesh, pytest.mark.optimised]  # bits

KILLS, STEPS = 10, 1500
# a shell that refuses files of more than 3 KiB, which those of a checkpoint are
LITTLE_ROOM = ["bash", "-c", 'trap "" XFSZ; ulimit -f 3; exec "$@"', "bash"]
OPTIONS = ["save_every=7", "log_every=5", "ema=0.99", "lengths=[0.05,0.1]"]


def start(workdir, steps=STEPS, shell=(), **options):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*shell, sys.executable, toy.__file__, str(workdir), str(steps), *OPTIONS]
    workdir.mkdir(exist_ok=True)
    with (workdir / "told").open("a") as file:
        return subprocess.Popen(command, env=environment, **{"stderr": file} | options)


def told(workdir):
    return (workdir / "told").read_text()


def newest(workdir):
    folders = (workdir / "checkpoints").glob("*")
    return max((int(path.name) for path in folders if path.name.isdigit()), default=0)


def test_ten_kills_change_no_bit(tmp_path):
    whole = start(tmp_path / "whole")
    seed = random.randrange(1 << 30)
    draw, cut = random.Random(seed), tmp_path / "cut"
    reached = [0]
    for _ in range(KILLS):
        child = start(cut)
        while newest(cut) == reached[-1] and child.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.6))  # a save takes a third of the time between two
        child.send_signal(signal.SIGKILL)
        child.wait()
        reached.append(newest(cut))
    last = start(cut)
    assert whole.wait() == last.wait() == 0, seed
    assert told(cut).count("going on from step") == KILLS, seed
    with np.load(tmp_path / "whole/state.npz") as a, np.load(cut / "state.npz") as b:
        assert len(a.files) == len(b.files) > 10
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"seed {seed}")
    assert toy.rows(cut) == toy.rows(tmp_path / "whole"), seed
    assert not list((cut / "checkpoints").glob("*tmp*")), "what a kill left is cleaned up"


def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(tmp_path):
    good = start(tmp_path, 14)
    assert good.wait() == 0
    full = start(tmp_path, 28, shell=LITTLE_ROOM, stderr=subprocess.PIPE, text=True)
    says = full.communicate()[1]
    assert full.returncode != 0
    folder = tmp_path / "checkpoints"
    assert f"{folder} cannot be written: File too large (file system " in says
    assert "; the newest whole one is of step 14" in says
    assert newest(tmp_path) == 14 and not list(folder.glob("*tmp*"))
    assert start(tmp_path, 28).wait() == 0
    assert told(tmp_path).count("going on from step 14") == 1 and newest(tmp_path) == 28


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 4 and 8."""
    toy.fit(tmp_path, toy.settings(8))
    return tmp_path


def data(folder, change):
    """Changes every file of numbers."""
    for path in (folder / "state").rglob("d/*"):
        change(path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "cut short": lambda folder: data(folder, cut),
    "a bit flipped": lambda folder: data(folder, flip),
    "data gone": lambda folder: data(folder, Path.unlink),
    "state gone": lambda folder: shutil.rmtree(folder / "state"),
    "notes gone": lambda folder: shutil.rmtree(folder / "notes"),
    "notes cut": lambda folder: cut(folder / "notes" / "metadata"),
    "notes of another type": lambda folder: (folder / "notes" / "metadata").write_text("[]"),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_checkpoint_is_used_and_named(saved, caplog, kind):
    DAMAGE[kind](saved / "checkpoints" / "8")
    with caplog.at_level(logging.INFO, logger="composer_jax"):
        again = toy.fit(saved, toy.settings(12))
    assert "checkpoint 8 is set aside" in caplog.text and "going on from step 4" in caplog.text
    whole = toy.fit(saved / "whole", toy.settings(12))
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert toy.rows(saved) == toy.rows(saved / "whole")


@pytest.mark.parametrize("content", ["[]", "5", "{", ""])
def test_orbaxs_own_metadata_may_be_damaged(saved, caplog, content):
    (saved / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text(content)
    with caplog.at_level(logging.INFO, logger="composer_jax"):
        toy.fit(saved, toy.settings(12))
    assert "going on from step 8" in caplog.text
    removed = "_CHECKPOINT_METADATA is damaged and removed" in caplog.text
    assert removed == (content in ("[]", "5"))
