"""`composer sample` as its user meets it: reports, previews, going on, and refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from composer_jax.cli import main
from tests.disks import file_limit


@pytest.fixture(scope="module")
def words(run):
    return ["sample", "--model", str(run), "--steps", "2", "--palette", "#d62828,#003049"]


def test_a_call_goes_on_and_reports(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, "--out", str(out), "--count", "1"]) == 0
    first = (out / "0000.png").read_bytes()
    (out / "0000.png").touch()
    written = (out / "0000.png").stat().st_mtime_ns
    more = [*words, "--out", str(out), "--count", "3", "--report", "--previews", "1"]
    assert main(more) == 0
    assert (out / "0000.png").stat().st_mtime_ns == written  # not made again
    assert (out / "0000.png").read_bytes() == first
    assert Image.open(out / "0002.png").size == (64, 64)
    assert {path.name for path in (out / "previews").iterdir()} == {"0000.png", "0001.png"}
    said = capsys.readouterr().out
    assert "palette    mean" in said and "report.html" in said
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "palette" in page
    assert main([*words, "--out", str(out), "--guidance", "5"]) == 2
    assert "another guidance (2.0, now it is 5.0); give another --out" in capsys.readouterr().err
    assert np.asarray(Image.open(out / "grid.png")).shape == (66, 3 * 66, 3)


def test_a_call_of_an_older_version_goes_on_and_says_that_it_makes_no_previews(
    words, tmp_path, capsys, caplog
):
    call = [*words, "--out", str(tmp_path), "--count", "1"]
    assert main(call) == 0
    kept = json.loads((tmp_path / "call.json").read_text())
    for key in ("precision", "steps_offset", "final", "shift"):
        del kept[key]
    (tmp_path / "call.json").write_text(json.dumps(kept))
    assert main([*call, "--precision", "highest"]) == 2
    assert "another precision ('default', now it is 'highest')" in capsys.readouterr().err
    assert main([*call, "--previews", "1"]) == 0
    assert caplog.messages == ["--previews does nothing: all images are there, none is made"]


def test_a_call_goes_on_after_trouble(words, tmp_path, capsys, caplog):
    out = tmp_path / "made/out"
    call = [*words, "--out", str(out), "--count", "2"]
    for size in (0, 2000):  # no room for call.json, then for no image
        with file_limit(size):
            assert main(call) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{out}/" in error and "file system" in error
    assert main(call) == 0
    images = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "0001.png").write_bytes(images["0001.png"][:100])
    (out / "call.json").write_text("")
    assert main(call) == 0
    assert "0001.png is damaged" in caplog.text and "call.json is damaged" in caplog.text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == images


def test_no_space_for_a_preview_is_one_line(words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/previews").write_text("")
    assert main([*words, "--out", str(tmp_path / "out"), "--previews", "1", "--count", "1"]) == 2
    assert "holds previews already" in capsys.readouterr().err
    with file_limit(2000):
        call = [*words, "--out", str(tmp_path / "new"), "--previews", "1", "--count", "1"]
        assert main(call) == 1
    error = capsys.readouterr().err
    assert "previews/0000.png cannot be written" in error and "Traceback" not in error
    (tmp_path / "new/previews").mkdir(exist_ok=True)  # as where there was room for the first
    (tmp_path / "new/previews/0000.png").write_bytes(b"")
    assert main(call) == 0


def test_a_refused_call_leaves_its_folder_to_the_next(words, tmp_path, capsys):
    out = tmp_path / "made/out"
    for more in (["--interval", ".5:.2"], ["--report", "--depth-weights", "nowhere"]):
        assert main([*words, "--out", str(out), *more]) == 2
        assert not list(tmp_path.iterdir())
    assert main([*words, "--out", str(out), "--count", "1"]) == 0


def test_a_report_of_two_conditions_compares_their_directions(words, tmp_path, capsys):
    sketch = tmp_path / "sketch.png"
    lines = np.zeros((64, 64), np.uint8)
    lines[20:22, 8:56] = 255
    Image.fromarray(lines).save(sketch)
    out = tmp_path / "out"
    assert (
        main([*words, "--sketch", str(sketch), "--out", str(out), "--count", "1", "--report"]) == 0
    )
    page = (out / "report.html").read_text()
    assert "Conflict" in page and "sketch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rescale", "2"], "--rescale: the value is 2.0; a number from 0 to 1 is wanted"),
        (["--autoguidance", "2"], "--autoguidance needs --guide"),
        (["--eta", "0.5", "--solver", "heun"], "eta is for the solver ddim"),
        (["--solver", "unipcc"], "'unipcc' (did you mean 'unipc'?)"),
        (["--size", "65"], "size is 65; a multiple of"),
        (["--interval", "0.5"], "START:END"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(words, tmp_path, capsys, more, says):
    out = tmp_path / "out"
    assert main([*words, "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not out.exists()
