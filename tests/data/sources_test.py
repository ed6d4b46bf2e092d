"""Sources: a folder of anybody's files, the names people type."""

import json

import numpy as np
import pytest
from PIL import Image

from composer_jax.data.sources import open_source

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
    import skimage.data

    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "a.png")
    Image.fromarray(skimage.data.coffee()).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("a cup of coffee\n")
    (tmp_path / "c.png").write_text("this is text")
    data = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "d.jpg").write_bytes(data[: len(data) // 2])
    return tmp_path


def test_folder_skips_and_names_what_is_broken(folder, caplog):
    source = open_source(f"folder:{folder}", size=32)
    batch = source.batch(range(len(source)))
    assert batch["image"].shape == (2, 32, 32, 3)
    assert batch["given"]["caption"] == ["", "a cup of coffee"]
    assert set(source.skipped) == {"c.png", "d.jpg"}
    assert "c.png" in caplog.text and "d.jpg" in caplog.text
    source.batch(range(len(source)))
    assert caplog.text.count("d.jpg") == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_gives_captions(folder, kind):
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "Eileen"}))
    else:
        (folder / "metadata.csv").write_text("file_name,text\na.png,Eileen\n")
    assert open_source(f"folder:{folder}", size=16).batch([0])["given"]["caption"] == ["Eileen"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sceens", "did you mean 'scenes'"),
        ("cache:made", "'cache:made'; allowed: .*; for training cache:DIR"),
        ("scenes:many", "'many'; a whole number from 1"),
        ("folder:/does/not/exist", "does not exist"),
        ("folder:~/does-not-exist", "/does-not-exist does not exist"),
        ("folder:", "lacks what comes after"),
        ("tar:", "lacks what comes after"),
        ("tfds:", "lacks what comes after"),
    ],
)
def test_wrong_sources_end_in_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        open_source(text, size=16)


def test_empty_folder_and_broken_metadata(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        open_source(f"folder:{tmp_path / 'empty'}", size=16)
    (folder / "metadata.jsonl").write_text('{"file": "a.png"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl: line 1 needs file_name"):
        open_source(f"folder:{folder}", size=16)


def test_a_relative_path_is_another_source_elsewhere(tmp_path, folder, monkeypatch):
    keys = []
    for place in ("here", "there"):
        (tmp_path / place / "photos").mkdir(parents=True)
        (tmp_path / place / "photos" / "a.png").write_bytes((folder / "a.png").read_bytes())
        monkeypatch.chdir(tmp_path / place)
        keys.append(open_source("folder:photos", size=16).key)
    assert keys[0] != keys[1]
    assert keys[1] == open_source(f"folder:{tmp_path / 'there' / 'photos'}", size=16).key


def test_images_are_drawn_from_all_over_a_source(folder):
    source = open_source(f"folder:{folder}", size=16)
    draws = [source.drawn(2, seed).tolist() for seed in range(20)]
    assert draws == [source.drawn(2, seed).tolist() for seed in range(20)]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert {index for draw in draws for index in draw} == set(range(len(source)))
    assert any(draw != sorted(draw) for draw in draws)
    assert sorted(source.drawn(100, 0)) == list(range(len(source)))
    assert open_source("scenes:8", size=16).drawn(4, 1).tolist() == [0, 1, 2, 3]


def test_crop_is_the_centre(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    Image.fromarray(image).save(tmp_path / "x.png")
    assert np.all(open_source(f"folder:{tmp_path}", size=10).batch([0])["image"] == 200)
