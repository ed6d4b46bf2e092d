"""Nothing is replaced that we did not write."""

import os

import pytest

from composer_jax.utils.owned import (
    MANIFEST,
    check_apart,
    check_ours,
    foreign,
    record,
    replaced_folder,
)

pytestmark = pytest.mark.fast


def make(folder, **files):
    with replaced_folder(folder) as new:
        for name, text in files.items():
            path = new / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def test_what_we_wrote_is_replaced(tmp_path):
    make(tmp_path / "out", a="1", vae__b="2")
    assert foreign(tmp_path / "out") == []
    make(tmp_path / "out", c="3")
    assert sorted(os.listdir(tmp_path / "out")) == ["c", MANIFEST]
    assert os.listdir(tmp_path) == ["out"]


def _add(out):
    (out / "vae/notes.md").write_text("mine")


def _change(out):
    (out / "a").write_text("2")


def _link(out):
    (out / "link").symlink_to(out / "a")


def _pipe(out):
    os.mkfifo(out / "pipe")


def _unlist(out):
    (out / MANIFEST).unlink()


def _damage(out):
    (out / MANIFEST).write_text("[]")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_add, "vae/notes.md"),
        (_change, "holds a,"),
        (_link, "link"),
        (_pipe, "pipe"),
        (_unlist, "vae/b"),
        (_damage, MANIFEST),
    ],
)
def test_what_others_wrote_is_named_and_stays(tmp_path, change, named):
    out = tmp_path / "out"
    make(out, a="1", vae__b="2")
    change(out)
    before = {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")}
    for attempt in (lambda: make(out, c="3"), lambda: check_ours(out)):
        with pytest.raises(ValueError, match=named):
            attempt()
    assert {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_stranger_that_comes_while_we_write_stays(tmp_path):
    make(tmp_path / "out", a="1")
    with pytest.raises(ValueError, match="holds mine"), replaced_folder(tmp_path / "out"):
        (tmp_path / "out/mine").write_text("x")
    assert (tmp_path / "out/mine").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_kept_stays_beside_what_is_new(tmp_path):
    out = tmp_path / "model"
    make(out, a="1", gone="1")
    (out / "notes").write_text("mine")
    (out / "link").symlink_to("notes")
    (out / "programs").mkdir()
    (out / "programs/p").write_text("traced")
    record(out / "programs", [out / "programs/p"])
    with replaced_folder(out, keep=True) as new:
        (new / "a").write_text("2")
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*"))
    listed = [MANIFEST, "link", "notes", "programs", f"programs/{MANIFEST}", "programs/p"]
    assert left == sorted(["a", *listed])
    assert (out / "a").read_text() == "2" and (out / "link").read_text() == "mine"
    assert foreign(out) == ["link", "notes"]


def test_what_was_changed_is_kept_under_another_name(tmp_path, caplog):
    out = tmp_path / "model"
    make(out, a="1", b="1")
    (out / "a").write_text("mine")
    for text in ("2", "3"):
        with replaced_folder(out, keep=True) as new:
            (new / "a").write_text(text)
    assert (out / "a").read_text() == "3" and (out / "a.kept").read_text() == "mine"
    assert sorted(os.listdir(out)) == ["a", "a.kept", MANIFEST]


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    make(tmp_path / "out", a="1")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="current folder"):
        make(tmp_path / "out", a="2")


def test_an_input_is_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source/unet").mkdir(parents=True)
    (tmp_path / "link").symlink_to("source")
    for out in ("source", "./source/", "link", "source/unet", "link/new", ".", "../" * 9):
        with pytest.raises(ValueError, match="read"):
            check_apart([tmp_path / out], ["source"])
    for out in ("other", "sourced", "link2"):
        check_apart([tmp_path / out], ["source", "a/hub-name"])
