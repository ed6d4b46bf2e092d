"""Several processes on one machine: one job, the same numbers, and one end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from composer_jax.training.cluster import join, share
from composer_jax.training.sharding import make_mesh
from tests.training import toy

pytestmark = pytest.mark.mesh  # eight devices here, as many as processes there

ROOT = Path(__file__).parents[2]


def start(processes, workdir, steps, *options):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch/local.py"), "--processes", str(processes), "--"]
    command += [sys.executable, toy.__file__, str(workdir), str(steps), *options]
    with (workdir / "told").open("a") as file:
        return subprocess.Popen(command, env=environment, stderr=file)


def told(workdir):
    return (workdir / "told").read_text()


def grandchildren(job):
    return list(map(int, subprocess.check_output(["pgrep", "-P", str(job.pid)]).split()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in this process."""
    workdir = tmp_path_factory.mktemp("alone")
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    toy.fit(workdir, toy.settings(12, mesh=mesh, log_every=1))
    return workdir


def close(workdir, other):
    a, b = toy.rows(workdir), toy.rows(other)
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, 13))
    for key in ("loss", "grad_norm", "update_norm"):
        np.testing.assert_allclose([r[key] for r in a], [r[key] for r in b], rtol=1e-5)


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [(2, '{"data":-1,"fsdp":1,"tensor":1}'), (4, '{"data":1,"fsdp":2,"tensor":2}')],
)
def test_processes_give_the_losses_of_one(alone, tmp_path, processes, mesh):
    job = start(processes, tmp_path, 12, f"mesh={mesh}", "log_every=1")
    assert job.wait() == 0, told(tmp_path)
    close(alone, tmp_path)


def test_one_process_killed_ends_the_others_and_the_job_goes_on(alone, tmp_path):
    job = start(2, tmp_path, 100_000, "log_every=1")
    while not (tmp_path / "checkpoints" / "8").is_dir():
        assert job.poll() is None
        time.sleep(0.05)
    os.kill(grandchildren(job)[1], signal.SIGKILL)
    assert job.wait(timeout=60)
    why = r"process 1 was ended by SIGKILL|has lost another"
    assert re.search(why, told(tmp_path)), told(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    steps = [row["step"] for row in toy.rows(tmp_path)]
    assert max(steps) >= 8
    again = start(2, tmp_path, max(steps) + 5, "log_every=1")
    assert again.wait() == 0 and "going on from step" in told(tmp_path)
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:12]))
    close(alone, tmp_path)


def test_damage_that_one_process_alone_sees_is_agreed_upon(alone, tmp_path, monkeypatch):
    monkeypatch.setenv(toy.BALLAST, "1")
    split = ('mesh={"data":1,"fsdp":2,"tensor":1}', "log_every=1")
    assert start(2, tmp_path, 8, *split).wait() == 0, told(tmp_path)
    parts = (tmp_path / "checkpoints/8/state/ocdbt.process_1/d").iterdir()
    os.truncate(max(parts, key=lambda path: path.stat().st_size), 1000)
    assert start(2, tmp_path, 12, *split).wait() == 0, told(tmp_path)
    assert told(tmp_path).count("checkpoint 8 is set aside") == 2
    assert "another process cannot read its part" in told(tmp_path)
    assert told(tmp_path).count("going on from step 4") == 2
    close(alone, tmp_path)


def test_sigterm_to_one_process_saves_in_all(tmp_path):
    job = start(2, tmp_path, 100_000, "save_every=1000000")
    while not (tmp_path / "metrics.jsonl").is_file():
        assert job.poll() is None
        time.sleep(0.05)
    os.kill(grandchildren(job)[1], signal.SIGTERM)
    job.wait(timeout=60)
    assert told(tmp_path).count("stopped by SIGTERM, saved at step") == 2, told(tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("[0-9]*"))) == 1


def test_what_the_environment_lacks_is_named(monkeypatch):
    monkeypatch.setenv("COMPOSER_PROCESSES", "4")
    with pytest.raises(ValueError, match="COMPOSER_PROCESS from 0 to 3"):
        join()
    monkeypatch.setenv("COMPOSER_PROCESSES", "many")
    with pytest.raises(ValueError, match="a number of processes or auto"):
        join()


def test_a_batch_that_the_mesh_cannot_split_is_named():
    assert share(make_mesh(data=4, fsdp=2), 16) == (0, 1)
    with pytest.raises(ValueError, match="batch 12 is not a multiple"):
        share(make_mesh(), 12)
