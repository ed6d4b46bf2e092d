"""The table of a sweep says what its runs' own files say."""

import csv
import io
import json

import numpy as np
import pytest

from composer_jax.evaluation.sweeps import FAILED, MEASURED, TRAINED, Table, interval, results

pytestmark = pytest.mark.fast


def made(folder, control, losses):
    (folder / TRAINED).mkdir(parents=True)
    (folder / MEASURED).mkdir()
    lines = [
        {"step": i, "loss": loss, "images_per_second": 10.0 * i} for i, loss in enumerate(losses, 1)
    ]
    lines.insert(1, {"step": 1, "held_out_loss": 0.7})
    (folder / TRAINED / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {
        "control": {name: {"normalised": value} for name, value in control.items()},
        "everything": {"palette": 0.9, "sketch": 0.7, "depth": None},
        "retention": {"palette | sketch": 0.8, "sketch | palette": 1.0},
    }
    (folder / MEASURED / "control.json").write_text(json.dumps(found))
    return results(folder)


def test_results_are_read_from_the_runs_own_files(tmp_path):
    row = made(tmp_path / "a", {"palette": 0.5, "sketch": 0.7, "depth": None}, [0.9, 0.4, 0.3])
    assert row == {
        "palette": 0.5, "sketch": 0.7, "mean": pytest.approx(0.6), "all given": pytest.approx(0.8),
        "retention": pytest.approx(0.9), "loss": 0.3, "held out loss": 0.7, "images/s": 20.0,
    }  # fmt: skip
    assert results(tmp_path / "b") == {}


def test_means_and_intervals_are_over_seeds():
    runs = {
        ("x", 0): {"sketch": 0.4, "loss": 1.0},
        ("x", 1): {"sketch": 0.6, "loss": 2.0},
        ("y", 0): {"sketch": 0.5, "loss": 3.0},
        ("y", 1): {},
        ("z", 0): {},
    }
    table = Table(runs, {("y", 1): "train ended with 2: no such key"})
    half = interval([0.4, 0.6])
    assert half == pytest.approx(12.706 * np.sqrt(0.02 / 2), rel=1e-3)  # t of one degree
    assert table.rows() == [
        ["x", "2", f"0.500 ± {half:.3f}", f"1.5000 ± {interval([1.0, 2.0]):.4f}"],
        ["y", "1", "0.500", "3.0000"],
        ["z", "0", "-", "-"],
    ]
    markdown = table.markdown()
    assert "| y | 1 | 0.500 | 3.0000 |" in markdown and "y, seed 1: train ended" in markdown
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert [line["state"] for line in lines] == [
        "done", "done", "done", "train ended with 2: no such key", "not done",
    ]  # fmt: skip
    assert lines[1]["sketch"] == "0.6"
    page = table.html("a sweep", "what was asked")
    assert page.count("<svg") == 1 and "what was asked" in page and FAILED not in page
