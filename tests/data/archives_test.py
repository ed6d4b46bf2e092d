"""Tar files give what a folder of the same files gives, but for fields that webdataset knows."""

import io
import os
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from composer_jax.data.sources import Crop, open_source


def png(seed, size=(40, 24)):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "a/one.png": png(1),
    "a/one.txt": b"a red cone\n",
    "a/two.PNG": png(2),
    "a/two.json": b'{"caption": "a blue ball", "width": 3}',
    "three.png": png(3),
    "three.json": b"{broken",
    "four.png": b"no image",
    "words.txt": b"of no image",
}


def pack(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_tars_hold_images_and_their_captions(tmp_path):
    pack(tmp_path / "0.tar", dict(list(FILES.items())[:4]))
    pack(tmp_path / "1.tar", dict(list(FILES.items())[4:]))
    source = open_source(f"tar:{tmp_path}/*.tar", size=16)
    found = source.batch(range(len(source)))
    assert len(source) == 4
    assert found["given"]["caption"] == ["a red cone", "a blue ball", ""]
    assert list(source.skipped) == [f"{tmp_path}/1.tar/four.png"]
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = open_source(f"folder:{tmp_path / 'folder'}", size=16)
    of_folder = {folder.label(i): i for i in range(len(folder))}
    same = folder.batch([of_folder[name] for name in ("a/one.png", "a/two.PNG", "three.png")])
    np.testing.assert_array_equal(found["image"], same["image"])


def test_a_truncated_tar_gives_what_it_still_holds(tmp_path, caplog):
    path = pack(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(6)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    source = open_source(f"tar:{path}", size=16)
    found = source.batch(range(len(source)))
    assert 1 <= len(found["image"]) <= 4
    assert "cut short" in caplog.text or source.skipped


def found(path, size=16):
    """{member: (colour of its first pixel, caption)}"""
    source = open_source(f"tar:{path}", size=size)
    batch = source.batch(range(len(source)))
    names = [source.label(i).removeprefix(f"{path}/") for i in range(len(source))]
    captions = batch["given"]["caption"]
    colours = batch["image"][:, 0, 0, 0].tolist()
    return dict(zip(names, zip(colours, captions, strict=True), strict=True))


def plain(value):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def test_members_are_fields_of_a_key(tmp_path, caplog):
    """The key ends at the first dot after the last slash; the case of fields does not count."""
    files = {
        "./a/v1.0/000.seg.png": plain(9),
        "./a/v1.0/000.PNG": plain(1),
        "./a/v1.0/000.TXT": b"one",
        "b/000.png": plain(2),
        "b/000.cls": b"3",
        "000.txt": b"first in its place",
        "001.png": plain(3),
        "000.jpg": plain(4),
        "001.caption": b"from kohya",
        "000.json": b'{"caption": "spare"}',
        ".hidden/a.png": plain(5),
        "__MACOSX/a.png": plain(6),
        "b/._000.png": b"",
        "noext": b"",
        "002.png": plain(7),
        "002.txt": b"",
        "002.json": b'{"caption": null, "text": ["two", "three"]}',
    }
    pack(tmp_path / "0.tar", files)
    captions = {name: caption for name, (_, caption) in found(tmp_path / "0.tar").items()}
    assert captions == {
        "a/v1.0/000.PNG": "one",
        "b/000.png": "",
        "000.jpg": "first in its place",
        "001.png": "from kohya",
        "002.png": "two",
    }  # fmt: skip
    told = next(line for line in caplog.messages if "left out" in line)
    for kind in ("1 .seg.png (", "1 .cls (", "3 hidden (", "1 without a suffix ("):
        assert kind in told
    assert "1 of 5 images have no caption" in caplog.text and "b/000.png" in caplog.text


def test_two_images_of_a_key_are_two_and_a_name_twice_is_the_last(tmp_path, caplog):
    path = pack(tmp_path / "0.tar", {"a.png": plain(1), "a.bmp": plain(2), "a.txt": b"words"})
    assert found(path) == {"a.png": (1, "words"), "a.bmp": (2, "words")}
    pack(path, {"a.png": plain(3), "a.txt": b"better words"}, "a")
    assert found(path) == {"a.png": (3, "better words"), "a.bmp": (2, "better words")}
    assert "2 members (a.png, a.txt) more than once; the last counts" in caplog.text


def test_tables_in_a_tar_give_captions(tmp_path):
    rows = b'{"file_name": "a.png", "text": "words", "depth_file_name": "b.png"}'
    files = {"s/metadata.jsonl": rows, "s/a.png": plain(1), "s/b.png": plain(2)}
    assert found(pack(tmp_path / "0.tar", files)) == {"s/a.png": (1, "words")}


@pytest.mark.parametrize(
    "form", ["gnu", "posix", "posix --sparse-version=0.1", "posix --sparse-version=0.0"]
)
def test_members_with_holes(tmp_path, form):
    """GNU tar stores of them what is no hole, and a map of it, in four ways."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    image = np.zeros((200, 200, 3), np.uint8)
    image[:40], image[-40:] = rng.integers(0, 256, (2, 40, 200, 3))
    Image.fromarray(image).save(buffer, "BMP")
    with open(tmp_path / "a.bmp", "wb") as file:
        content = buffer.getvalue()
        for start in range(0, len(content), 4096):
            block = content[start : start + 4096]
            file.seek(start)
            if block.strip(b"\0"):
                file.write(block)
        file.truncate(len(content))
    (tmp_path / "a.txt").write_text("words")
    for path in ("a.bmp", "b.bmp"):
        (tmp_path / path).exists() or os.link(tmp_path / "a.bmp", tmp_path / path)
    command = ["tar", "--sparse", f"--format={form}".split()[0], *form.split()[1:], "-cf", "0.tar"]
    subprocess.run([*command, "a.bmp", "a.txt", "b.bmp"], cwd=tmp_path, check=True)
    assert (tmp_path / "0.tar").stat().st_size < 100_000 < len(content)
    source = open_source(f"tar:{tmp_path}/0.tar", size=200)
    batch = source.batch(range(2))  # the second is a hard link to the first
    assert batch["given"]["caption"] == ["words", ""]
    for each in batch["image"]:
        np.testing.assert_array_equal(each, image)


def test_links_are_what_they_stand_for_where_that_is_there(tmp_path, caplog):
    path = pack(tmp_path / "0.tar", {"s/a.png": plain(1), "s/a.txt": b"words"})
    with tarfile.open(path, "a") as archive:
        for name, target in {
            "s/b.png": "a.png",
            "s/b.txt": "../s/a.txt",
            "c.png": "/etc/x",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    assert found(path) == {"s/a.png": (1, "words"), "s/b.png": (1, "words")}
    assert "1 link elsewhere (" in caplog.text and "c.png" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: tar[:1024], "has no end mark, and may be cut short; 1 sample"),
        (lambda tar: tar[:1024] + b"x" * 512 + tar[1024:], "is damaged at byte 1024"),
        (lambda tar: tar + tar, "has more behind its end mark"),
    ],
)
def test_what_no_reader_of_tars_reports_is_told(tmp_path, caplog, damage, message):
    path = pack(tmp_path / "0.tar", {"a.png": plain(1), "b.png": plain(2)})
    path.write_bytes(damage(path.read_bytes()))
    assert found(path)["a.png"] == (1, "")
    assert message in caplog.text


def test_a_tar_that_goes_away_is_an_image_that_is_skipped(tmp_path):
    source = open_source(f"tar:{pack(tmp_path / '0.tar', {'a.png': plain(1)})}", size=16)
    (tmp_path / "0.tar").unlink()
    assert len(source.batch([0])["image"]) == 0
    assert "a.png No such file" in source.skipped[source.label(0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "finds no file"),
        (lambda folder: pack(folder / "0.tar", FILES, "w:gz"), r"0.tar is compressed \(gzip\)"),
        (lambda folder: (folder / "0.tar").write_bytes(b"no tar" * 200), "0.tar is no tar"),
        (lambda folder: (folder / "0.tar").mkdir(), "0.tar cannot be read: Is a directory"),
        (lambda folder: (folder / "0.tar").touch(), "holds no image"),
        (lambda folder: pack(folder / "0.tar", {"a.txt": b"x"}), "holds no image"),
        (lambda folder: pack(folder / "0.tar", {"a.left.png": b"x"}), r"it has 1 .left.png \("),
    ],
)
def test_tars_that_cannot_be_used_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(f"tar:{tmp_path}/*.tar", size=16)


def test_crops_and_flips_are_functions_of_seed_and_index(tmp_path):
    pack(tmp_path / "0.tar", {f"{i}.png": png(i, (64, 16)) for i in range(12)})

    def images(**crop):
        source = open_source(f"tar:{tmp_path}/0.tar", size=16, crop=Crop(**crop))
        return source.batch(range(12))["image"], source.batch([7, 3])["image"]

    plain, _ = images()
    drawn, two = images(random=True, flip=True, seed=1)
    np.testing.assert_array_equal(two, drawn[[7, 3]])
    np.testing.assert_array_equal(images(random=True, flip=True, seed=1)[0], drawn)
    assert not np.array_equal(images(random=True, flip=True, seed=2)[0], drawn)
    flipped, _ = images(flip=True)
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, plain, strict=True)]
    as_it_was = [np.array_equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert all(np.logical_xor(mirrored, as_it_was)) and 2 < sum(mirrored) < 10
    with pytest.raises(ValueError, match="captions say left and right"):
        open_source("scenes:4", size=16, crop=Crop(flip=True))
