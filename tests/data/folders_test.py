"""Folders: which files are images, which are left out and said to be, where captions come from."""

import json
import os
import shutil

import pytest
from PIL import Image

from composer_jax.data.sources import image_suffixes, open_source
from composer_jax.utils.owned import record

pytestmark = pytest.mark.fast


def draw(path, form="PNG", value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(path, form)


def captions(folder):
    """{image: caption}"""
    source = open_source(f"folder:{folder}", size=8)
    found = source.batch(range(len(source)))
    names = [source.label(i) for i in range(len(source)) if source.label(i) not in source.skipped]
    return dict(zip(names, found["given"]["caption"], strict=True))


def test_whatever_pillow_reads_is_an_image_and_the_rest_is_named(tmp_path, caplog):
    forms = {"a.jpg": "JPEG", "b.JFIF": "JPEG", "c.avif": "AVIF", "d.gif": "GIF"}
    forms |= {"e.jp2": "JPEG2000", "f.tif": "TIFF", "g.ppm": "PPM", "h.x.WebP": "WEBP"}
    forms["v1.0/i.png"] = "PNG"
    for name, form in forms.items():
        draw(tmp_path / name, form)
    for name in ("x.heic", "y.heic", "x.jxl", "README", "of_no_image.txt", "shard.h5"):
        (tmp_path / name).write_bytes(b"bytes")
    draw(tmp_path / ".thumbnails" / "a.png")
    draw(tmp_path / "__pycache__" / "a.png")
    draw(tmp_path / "._a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "away.png").symlink_to("nowhere.png")
    assert set(captions(tmp_path)) == set(forms)
    (told,) = (line for line in caplog.messages if "left out" in line)
    for part in ("2 .heic (x.heic, y.heic)", "1 .jxl (x.jxl)", "1 .h5", "1 .txt (of_no",
                 "1 without a suffix (README)", "1 no file (pipe.png)", "1 broken link (away.png)",
                 "3 hidden"):  # fmt: skip
        assert part in told
    assert "3 hidden (._a.png, .thumbnails/, __pycache__/)" in told
    assert not {".h5", ".mpg", ".heic", ".pdf"} & image_suffixes()


def test_what_commands_wrote_is_no_photo(tmp_path, caplog):
    draw(tmp_path / "a.png")
    draw(tmp_path / "2024.png")
    draw(tmp_path / "samples" / "mine.png")
    for name in ("0000.png", "0001.png"):
        draw(tmp_path / "samples" / name)
    (tmp_path / "samples" / "call.json").write_text("{}")
    draw(tmp_path / "samples" / "grid.png")
    record(tmp_path / "samples", [tmp_path / "samples" / "grid.png"])
    for name in ("a/sketch.png", "a/depth.png", "changed.png"):
        draw(tmp_path / name)
    record(tmp_path, [tmp_path / name for name in ("a/sketch.png", "a/depth.png", "changed.png")])
    draw(tmp_path / "changed.png", value=9)
    assert set(captions(tmp_path)) == {"a.png", "2024.png", "samples/mine.png", "changed.png"}
    told = "5 written by composer (a/depth.png, a/sketch.png, samples/0000.png, ...)"
    assert told in "".join(caplog.messages)
    (tmp_path / "samples" / "mine.png").unlink()  # who asks for samples alone gets them
    assert set(captions(tmp_path / "samples")) == {"0000.png", "0001.png"}


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path, caplog):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder / "z" / "a.png", elsewhere / "b.png"):
        draw(path)
    (elsewhere / "b.txt").write_text("words")
    (folder / "a_first").symlink_to(folder / "z", target_is_directory=True)
    (folder / "more").symlink_to(elsewhere, target_is_directory=True)
    (folder / "up").symlink_to("..", target_is_directory=True)
    (folder / "z" / "loop").symlink_to(folder, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to("self")
    assert captions(folder) == {"more/b.png": "words", "z/a.png": ""}
    assert "linked again" in caplog.text and "1 broken link (self)" in caplog.text
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert set(captions(link)) == {"more/b.png", "z/a.png"}


def test_texts_beside_images(tmp_path, caplog):
    texts = {
        "a.txt": " of a\r\n",
        "b.CAPTION": "of b",
        "c.json": '{"caption": ["of c", "more"]}',
        "d.txt": "",
        "d.caption": "of d",
        "d.json": '{"caption": "not this"}',
        "e.v2.txt": "of e",
        "f.json": '{"caption": 5}',
        "g.json": "{broken",
        "sub/a.txt": "of another a",
    }
    for name in (
        "a.png",
        "a.JPG",
        "b.png",
        "c.png",
        "d.png",
        "e.v2.png",
        "f.png",
        "g.png",
        "sub/a.png",
    ):
        draw(tmp_path / name)
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    draw(tmp_path / "h.png")
    (tmp_path / "h.txt").write_bytes(b"caf\xe9")
    assert captions(tmp_path) == {
        "a.png": "of a", "a.JPG": "of a", "b.png": "of b", "c.png": "of c", "d.png": "of d",
        "e.v2.png": "of e", "f.png": "", "g.png": "", "h.png": "", "sub/a.png": "of another a",
    }  # fmt: skip
    for line in (
        "f.png: no caption from f.json caption is int (5), not text",
        "g.png: no caption from g.json is not JSON",
        "h.png: no caption from h.txt is not UTF-8",
        "3 of 10 images have no caption: f.png, g.png, h.png",
    ):
        assert line in caplog.text


def test_tables_win_over_texts_and_name_images_without_a_suffix(tmp_path):
    for name in ("sub/a.png", "sub/b.png", "sub/depth/a.png", "plain"):
        draw(tmp_path / name)
    rows = [{"file_name": "a.png", "text": "a row", "depth_file_name": "depth/a.png"},
            {"file_name": "b.png", "text": None}]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "sub" / "metadata.jsonl").write_text(lines)
    (tmp_path / "metadata.csv").write_text("file_name,text\nplain,without\n")
    for name in "ab":
        (tmp_path / "sub" / f"{name}.txt").write_text("beside")
    wanted = {"plain": "without", "sub/a.png": "a row", "sub/b.png": "beside"}
    assert captions(tmp_path) == wanted


def test_images_without_a_caption_are_told_once(tmp_path, caplog):
    for i in range(6):
        draw(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("words")
    (tmp_path / "5.png").write_text("no image")
    source = open_source(f"folder:{tmp_path}", size=8)
    source.batch([0, 1, 1, 2])
    assert "no caption" not in caplog.text
    for _ in range(2):
        source.batch([3, 4, 5])
    assert caplog.text.count("no caption") == 1
    assert "4 of 5 images have no caption: 1.png, 2.png, 3.png and 1 more" in caplog.text
    part = open_source(f"folder:{tmp_path}", size=8)
    part.batch([0, 3])
    part.tell()
    part.tell()
    assert caplog.text.count("1 of 2 images have no caption: 3.png") == 1


def test_a_folder_of_files_that_are_no_images_says_what_they_are(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(ValueError, match=r"holds no image; it has 1 \.heic \(a\.heic\)"):
        open_source(f"folder:{tmp_path}", size=8)


def test_a_text_that_goes_away_is_named(tmp_path, caplog):
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("words")
    source = open_source(f"folder:{tmp_path}", size=8)
    (tmp_path / "a.txt").unlink()
    assert source.batch([0])["given"]["caption"] == [""]
    assert "a.txt cannot be read: No such file" in caplog.text
    shutil.rmtree(tmp_path)
    assert source.skipped == {}
