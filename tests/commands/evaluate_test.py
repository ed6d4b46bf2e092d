"""`composer evaluate`: numbers, pictures, nothing made twice."""

import io
import json
import shutil

import numpy as np
import pytest

from composer_jax.cli import main
from composer_jax.evaluation.experiments import Samples
from tests.disks import file_limit


def evaluate(run, out, *more):
    words = ["evaluate", "--model", run, "--out", out, "--count", 4, "--seeds", 1, "--few", 2]
    return main([str(word) for word in (*words, "--steps", 1, "--experiments", "pairs", *more)])


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    assert evaluate(run, out) == 0
    return out


def test_every_condition_is_measured_and_shown(pipe, measured):
    found = json.loads((measured / "control.json").read_text())
    assert tuple(found["control"]) == pipe.names and not found["not measured"]
    for name, control in found["control"].items():
        rows = control["rows"]
        assert {"sample", "permuted", "floor", "oracle", "blank", "noise"} <= set(rows), name
        assert rows["oracle"]["score"] > rows["blank"]["score"], name
        assert len(control["scores"]) == 4
    assert found["settings"]["steps"] == 1 and found["settings"]["images"] == 4
    page = (measured / "report.html").read_text()
    assert all(f"{name}: best" in page for name in pipe.names if name != "sketch")


def test_what_is_there_is_not_made_again(run, measured, capsys):
    files = sorted((measured / "samples").iterdir())
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(files) == 1 + 8 + 1 + 28
    files[3].unlink()
    result = json.loads((measured / "control.json").read_text())
    assert evaluate(run, measured) == 0
    after = {path: path.stat().st_mtime_ns for path in sorted((measured / "samples").iterdir())}
    assert {path for path in files if after[path] != before[path]} == {files[3]}
    assert json.loads((measured / "control.json").read_text()) == result
    printed = capsys.readouterr().out
    assert "retention" in printed or not result["retention"]
    for name, control in result["control"].items():
        assert (f"{name} has no control: " in printed) == (control["normalised"] is None), name


def test_another_evaluation_in_the_same_folder_is_refused(run, measured, capsys):
    assert evaluate(run, measured, "--guidance", 5) == 2
    assert "another guidance (2.0, now it is 5.0)" in capsys.readouterr().err


def test_damaged_results_are_made_again_and_said(run, measured, tmp_path, caplog):
    out = shutil.copytree(measured, tmp_path / "out")
    parts = sorted((out / "samples").iterdir())
    kept = {path: path.read_bytes() for path in (*parts, out / "evaluation.json")}
    result = json.loads((out / "control.json").read_text())
    for path, content in zip(parts, (b"", kept[parts[1]][:300], b"text"), strict=False):
        path.write_bytes(content)
    np.savez(parts[3], images=np.zeros(3))
    (out / "control.json").write_text("{")
    assert evaluate(run, out) == 0
    for path in parts[:4]:
        assert f"{path} is damaged" in caplog.text
        np.testing.assert_array_equal(
            np.load(path)["images"], np.load(io.BytesIO(kept[path]))["images"]
        )
    assert caplog.text.count("is damaged") == 4
    assert json.loads((out / "control.json").read_text()) == result


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_the_call_is_told_by_the_samples_where_its_file_is_damaged(
    measured, tmp_path, content, caplog
):
    call = json.loads((measured / "evaluation.json").read_text())
    out = shutil.copytree(measured, tmp_path / "out")
    (out / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds samples/.* already, and evaluation.json is dam"):
        Samples(out, {**call, "steps": 7})
    Samples(out, call)
    assert "evaluation.json is damaged; it is written again" in caplog.text
    assert json.loads((out / "evaluation.json").read_text()) == call


@pytest.mark.parametrize("name", ["control.json", "report.html", "samples/00000004.png"])
def test_what_others_wrote_is_not_written_over(run, tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert evaluate(run, tmp_path) == 2
    assert f"holds {name.split('/')[0]} already" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_a_full_disk_leaves_a_folder_that_goes_on(run, measured, tmp_path, capsys):
    out = tmp_path / "made/out"
    for size in (0, 1500):  # no room for evaluation.json, then for no samples
        with file_limit(size):
            assert evaluate(run, out) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{out}/" in error and "file system" in error
    shutil.copytree(measured / "samples", out / "samples", dirs_exist_ok=True)
    with file_limit(1500):  # nor for control.json
        assert evaluate(run, out) == 1
    assert "control.json cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "samples"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--experiments", "pair"], "did you mean 'pairs'?"),
        (["--count", "1"], "--count: the value is 1; a whole number from 2"),
        (["--source", "folder:nowhere"], "nowhere"),
        (["--source", "scenes:1"], "scenes:1 gives 1 images; at least 2 are wanted"),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, capsys, words, line):
    assert evaluate(run, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_photos_are_measured_by_what_needs_no_network(run, tmp_path, capsys):
    import skimage.data
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for name in ("cat", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / "photos" / f"{name}.png")
    out = tmp_path / "out"
    assert (
        evaluate(run, out, "--source", f"folder:{tmp_path / 'photos'}", "--experiments", "alone")
        == 0
    )
    found = json.loads((out / "control.json").read_text())
    assert set(found["control"]) == {"intensity", "mask", "palette", "semantics", "sketch"}
    assert set(found["not measured"]) == {"caption", "depth", "instances"}
    assert "depth is not measured: depth needs" in capsys.readouterr().out
