"""`composer sweep`: failed runs are marked, the rest finished; what is done is not done again."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from composer_jax.cli import main
from tests.small import OVERRIDES

FILE = f"""
SMALL = {OVERRIDES}

def get_sweep():
    return {{
        "config": "scenes64:smoke",
        "overrides": ("steps=1", "conditions=palette", "source=scenes:8", *SMALL),
        "runs": {{"bad": ("source=folder:nowhere",), "good": ()}},
        "evaluate": ("--count", 2, "--seeds", 1, "--steps", 1, "--experiments", "alone"),
    }}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.py").write_text(FILE)
    words = ["sweep", "--config", str(folder / "mine.py"), "--out", str(folder / "out")]
    return folder, words, main(words)


def test_a_failed_run_is_marked_and_the_rest_finished(swept, capsys):
    folder, _, code = swept
    out = folder / "out"
    assert code == 1
    assert "nowhere" in (out / "bad-seed0" / "failed.txt").read_text()
    lines = {row["run"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert lines["bad"]["state"].startswith("train ended with 2")
    found = json.loads((out / "good-seed0" / "evaluation" / "control.json").read_text())
    assert float(lines["good"]["palette"]) == found["control"]["palette"]["normalised"]
    last = (out / "good-seed0" / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert float(lines["good"]["loss"]) == json.loads(last)["loss"]
    assert "nowhere" in (out / "table.md").read_text() and (out / "table.html").is_file()


def test_what_is_done_is_not_done_again(swept, capsys, monkeypatch):
    folder, words, _ = swept
    log = folder / "out" / "good-seed0" / "log.txt"
    before = log.stat().st_mtime_ns
    second_of_two(monkeypatch)  # the good one is this one's
    assert main(words) == 0
    assert log.stat().st_mtime_ns == before
    assert "1 of 2 runs are done" in capsys.readouterr().out
    assert main([*words, "--config.batch=4"]) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["control.json", "metrics.jsonl", "sweep.json"])
def test_damaged_files_are_named_and_do_not_end_it(swept, tmp_path, capsys, caplog, name):
    folder, words, _ = swept
    out = shutil.copytree(folder / "out", tmp_path / "out")
    path = next(out.rglob(name))
    path.write_text(path.read_text()[:-5])
    assert main([*words[:-1], str(out), "--table"]) in (0, 1)
    done = 0 if name == "control.json" else 1
    assert f"{done} of 2 runs are done" in capsys.readouterr().out
    assert f"{path}" in caplog.text and "damaged" in caplog.text


def test_a_damaged_reason_is_shown_as_far_as_it_can_be_read(swept, tmp_path):
    folder, words, _ = swept
    out = shutil.copytree(folder / "out", tmp_path / "out")
    (out / "bad-seed0" / "failed.txt").write_bytes(b"train ended \xff")
    assert main([*words[:-1], str(out), "--table"]) == 1
    assert "bad, seed 0: train ended" in (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('"--steps", "0"', "--steps: the value is 0"),
        ('"--experiments", "pair"', "did you mean 'pairs'?"),
        ('"--cuont", "2"', "--cuont"),
        ('"--out", "x"', "evaluate has --out, which the sweep sets itself"),
        ('"--model=x"', "evaluate has --model=x, which the sweep sets itself"),
    ],
)
def test_words_for_evaluate_are_checked_before_the_first_run(tmp_path, capsys, words, said):
    (tmp_path / "mine.py").write_text(FILE.replace('"--steps", 1, "--experiments", "alone"', words))
    call = ["sweep", "--config", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out")]
    assert main(call) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_others_wrote_is_not_written_over(swept, tmp_path, capsys):
    _, words, _ = swept
    (tmp_path / "table.csv").write_text("mine")
    assert main([*words[:-1], str(tmp_path)]) == 2
    assert "holds table.csv, and there is no sweep.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"good": ()', '"better": ()', "holds the run good-seed0, which mine does not have"),
        ('"--count", 2', '"--count", 3', "holds evaluate as ['--count', '2'"),
    ],
)
def test_another_sweep_leaves_the_tables_of_the_first(swept, tmp_path, capsys, old, new, says):
    folder, words, _ = swept
    (tmp_path / "mine.py").write_text(FILE.replace(old, new))
    before = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}
    assert main(["sweep", "--config", str(tmp_path / "mine.py"), *words[3:], "--table"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    kept = json.loads((folder / "out" / "sweep.json").read_text())
    assert sorted(kept) == ["bad-seed0", "evaluate", "good-seed0"]


def test_processes_share_the_runs(swept, capsys, monkeypatch):
    _, words, _ = swept
    second_of_two(monkeypatch)
    assert main([*words, "--list"]) == 0
    assert capsys.readouterr().out.startswith("good-seed0  steps=1")


def second_of_two(monkeypatch):
    monkeypatch.setenv("COMPOSER_PROCESS", "1")
    monkeypatch.setenv("COMPOSER_PROCESSES", "2")


def test_an_interrupted_sweep_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(FILE.replace("steps=1", "steps=100000"))
    words = ["sweep", "--config", tmp_path / "mine.py", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "composer_jax", *map(str, words)]
    run = tmp_path / "out" / "good-seed0"

    def until(seen):
        told = {"COMPOSER_PROCESS": "1", "COMPOSER_PROCESSES": "2"}
        child = subprocess.Popen(command, env={**os.environ, **told})
        while child.poll() is None and not seen():
            time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=120) == 130

    until(lambda: (run / "run" / "metrics.jsonl").is_file())
    assert any((run / "run" / "checkpoints").glob("[0-9]*"))
    assert not (run / "failed.txt").exists() and not (run / "evaluation").exists()
    until(lambda: "going on from step" in (run / "log.txt").read_text())
