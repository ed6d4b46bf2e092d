"""A series of images goes on where it stopped, and never mixes two calls."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from composer_jax.diffusion import use
from composer_jax.storage.series import Series, describe_uses
from composer_jax.utils.atomic import WriteError
from tests.disks import file_limit

pytestmark = pytest.mark.fast

CALL = {"seed": 0, "guidance": 2.0, "caption": ["red"]}
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


def test_it_goes_on_with_what_is_missing(tmp_path):
    series = Series(tmp_path / "out", CALL)
    assert series.missing(3) == [range(0, 3)]
    for i in (0, 1, 3):  # 2 was never finished
        series.add(i, IMAGE + i)
    again = Series(tmp_path / "out", CALL)
    assert again.missing(3) == [range(2, 3)] and again.missing(6) == [range(2, 3), range(4, 6)]
    again.add(2, IMAGE + 2)
    assert not again.missing(4)
    np.testing.assert_array_equal(again.images(3), [IMAGE, IMAGE + 1, IMAGE + 2])


def test_nothing_is_on_disk_before_the_first_image(tmp_path):
    Series(tmp_path / "a/b", CALL).missing(3)
    assert os.listdir(tmp_path) == []


def test_another_call_is_refused_by_what_differs(tmp_path):
    Series(tmp_path, CALL).add(0, IMAGE)
    with pytest.raises(ValueError, match=r"another guidance \(2.0, now it is 3.0\); give another"):
        Series(tmp_path, {**CALL, "guidance": 3.0})
    with pytest.raises(ValueError, match="another sketch"):
        Series(tmp_path, {**CALL, "sketch": []})


def test_a_call_from_before_there_was_a_key_goes_on(tmp_path):
    Series(tmp_path, CALL).add(0, IMAGE)
    former = {"precision": "default", "interval": (0.0, 1.0)}
    new = {**CALL, **former}
    with pytest.raises(ValueError, match="another interval"):
        Series(tmp_path, new)
    assert not Series(tmp_path, new, former).missing(1)
    with pytest.raises(ValueError, match=r"another precision \('default', now it is 'high'\)"):
        Series(tmp_path, {**new, "precision": "high"}, former)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"seed": 0'])
def test_images_tell_of_which_call_they_are_where_the_file_that_says_it_is_lost(
    tmp_path, content, caplog
):
    Series(tmp_path, CALL).add(0, IMAGE)
    (tmp_path / "call.json").unlink()
    if content is not None:
        (tmp_path / "call.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds 0000.png already, and .*call.json"):
        Series(tmp_path, {**CALL, "seed": 1})
    series = Series(tmp_path, CALL)
    assert ("call.json is damaged; it is written again" in caplog.text) == (content is not None)
    assert json.loads((tmp_path / "call.json").read_text()) == CALL
    assert not series.missing(1)


@pytest.mark.parametrize("name", ["0000.png", "0123.png", "grid.png", "report.html", "previews/a"])
def test_a_folder_with_what_others_wrote_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]} already"):
        Series(tmp_path, CALL)
    assert (tmp_path / name).read_text() == "mine"


def test_others_files_of_other_names_are_beside_the_point(tmp_path):
    (tmp_path / "2024-holiday.png").write_text("mine")
    Series(tmp_path, CALL).add(0, IMAGE)
    assert (tmp_path / "2024-holiday.png").read_text() == "mine"


def damaged(content: bytes, kind: str) -> bytes:
    if kind.startswith("cut"):
        return content[: int(len(content) * float(kind[3:]))]
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return bytes(changed) if kind == "flip" else b"text"


@pytest.mark.parametrize("kind", ["cut0", "cut.01", "cut.5", "cut.999", "flip", "text"])
def test_a_damaged_image_is_made_again_and_said(tmp_path, kind, caplog):
    series = Series(tmp_path, CALL)
    for i in range(3):
        series.add(i, IMAGE)
    path = tmp_path / "0001.png"
    path.write_bytes(damaged(path.read_bytes(), kind))
    again = Series(tmp_path, CALL)
    assert again.missing(3) == [range(1, 2)]
    assert "0001.png is damaged" in caplog.text and caplog.text.count("\n") == 1
    again.add(1, IMAGE)
    np.testing.assert_array_equal(again.images(3), [IMAGE] * 3)


def test_an_image_of_another_size_is_named(tmp_path):
    series = Series(tmp_path, CALL)
    series.add(0, IMAGE)
    Image.fromarray(IMAGE[:8]).save(tmp_path / "0001.png")
    with pytest.raises(ValueError, match=r"0001.png is of another size"):
        series.images(2)


@pytest.mark.parametrize("size", [0, 20, 500])
def test_a_full_disk_leaves_a_folder_that_goes_on(tmp_path, size):
    out = tmp_path / "a/out"
    with file_limit(size), pytest.raises(WriteError, match=str(out)):
        Series(out, CALL).add(0, IMAGE)
    series = Series(out, CALL)
    assert series.missing(1) == [range(0, 1)]
    series.add(0, IMAGE)
    with file_limit(size), pytest.raises(WriteError, match=r"0001.png cannot be written"):
        series.add(1, IMAGE)
    assert sorted(os.listdir(out)) == ["0000.png", "call.json"]


def test_a_use_is_described_by_all_that_it_says():
    lines = np.zeros((8, 8), np.uint8)
    one = describe_uses({"sketch": [use(lines)]})
    assert one == describe_uses({"sketch": [use(lines.copy())]})
    for other in (
        use(lines + 1),
        use(lines, strength=0.5),
        use(lines, window=(0, 0.5)),
        use(lines, region=np.ones((2, 2))),
        use(lines, negative=True),
        use({"map": lines}),
    ):
        assert one != describe_uses({"sketch": [other]})
