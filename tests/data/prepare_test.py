"""Preparing: made once, made anew when what makes it changes, never half-written."""

import os

import jax
import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.data.extractors import absent_values, load_extractors
from composer_jax.data.prepare import prepare, remembered
from composer_jax.data.sources import Source, open_source
from composer_jax.models.clip import Clip
from tests.small import small_config


@pytest.fixture
def source():
    return open_source("scenes:70", size=64)


def test_it_is_made_once_and_anew_when_its_maker_changes(source, tmp_path):
    calls = []

    def encode(images, given):
        calls.append(len(images))
        return images.mean(axis=(1, 2)).astype(np.float32)

    def pool(version):
        return prepare(
            source, ("sketch", "palette"), {}, {"mean": encode}, tmp_path / "pools", {"v": version}
        )

    first = pool(1)
    assert sum(calls) == len(source) == len(first["image"])
    assert isinstance(first["image"], np.memmap)
    wanted = source.batch(range(70))["image"]
    np.testing.assert_array_equal(first["image"], wanted)
    np.testing.assert_allclose(first["mean"], wanted.mean(axis=(1, 2)), rtol=1e-6)
    assert first["stored"]["palette"].shape == (70, 156)
    again = pool(1)
    assert sum(calls) == 70
    np.testing.assert_array_equal(again["stored"]["sketch"], first["stored"]["sketch"])
    pool(2)
    assert sum(calls) == 140


def flip(path, position):
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("image.npy", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("image.npy", lambda path: os.truncate(path, 0)),
        ("image.npy", lambda path: path.unlink()),
        ("stored.palette.npy", lambda path: path.unlink()),
        ("stored.palette.npy", lambda path: path.write_text("palette")),
        ("stored.palette.npy", lambda path: np.save(path, np.zeros((2, 156), np.float32))),
        ("image.npy", lambda path: flip(path, 1000)),
        ("stored.palette.npy", lambda path: flip(path, 300)),
        ("made_by.json", lambda path: path.write_text("{")),
        ("arrays.json", lambda path: path.write_text("[")),
        ("arrays.json", lambda path: path.write_text("{}")),
        ("arrays.json", lambda path: path.write_text("5")),
    ],
)
def test_a_damaged_pool_is_prepared_anew_and_said(tmp_path, caplog, name, damage):
    source = open_source("scenes:3", size=64)
    arguments = source, ("palette",), {}, {}, tmp_path / "pools", {}
    wanted = jax.tree.map(np.array, prepare(*arguments))
    (folder,) = (tmp_path / "pools").iterdir()
    damage(folder / name)
    jax.tree.map(np.testing.assert_array_equal, prepare(*arguments), wanted)
    assert f"{folder} is damaged" in caplog.text and "prepared anew" in caplog.text
    caplog.clear()
    prepare(*arguments)
    assert not caplog.text


def test_what_is_asked_of_a_source_is_asked_once(tmp_path):
    calls = []

    def ask():
        calls.append(1)
        return {"depth": None, "caption": "no text", "tokens": [[0.1, 1e-30], [3.0, -2.5]]}

    pools = tmp_path / "pools"
    found = [remembered(pools, ["source", 1], ask) for _ in range(2)]
    assert found[0] == found[1] and len(calls) == 1
    remembered(pools, ["source", 2], ask)
    assert len(calls) == 2 and len(list(pools.iterdir())) == 2
    assert remembered(None, ["source", 1], ask) == found[0] and len(calls) == 3
    (tmp_path / "file").touch()  # where nothing can be written
    assert remembered(tmp_path / "file", ["source", 1], ask) == found[0] and len(calls) == 4
    for path in pools.iterdir():
        path.write_text(path.read_text()[:20])  # damaged
    assert remembered(pools, ["source", 1], ask) == found[0] and len(calls) == 5


def test_a_second_start_encodes_nothing_and_has_the_same_absent_values(tmp_path, monkeypatch):
    config = small_config(["conditions=()"])
    source, extractors = open_source("scenes:4", size=64), load_extractors(config)
    names = extractors.conditions((), source, tmp_path)
    absent = extractors.absent(names, tmp_path)
    wanted = absent_values(names, extractors.tools)
    assert set(names) == set(conditions.names()) and set(absent) == {"caption"}
    jax.tree.map(np.testing.assert_array_equal, absent, wanted)
    monkeypatch.setattr(Clip, "text", None)
    monkeypatch.setattr(Clip, "image", None)
    assert extractors.conditions((), source, tmp_path) == names
    jax.tree.map(np.testing.assert_array_equal, extractors.absent(names, tmp_path), wanted)


def test_an_older_pool_stays_when_a_new_one_fails(source, tmp_path):
    prepare(source, ("sketch",), {}, {}, tmp_path / "pools", {})

    def broken(images, given):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        prepare(source, ("sketch",), {}, {"more": broken}, tmp_path / "pools", {})
    with pytest.raises(ValueError, match="depth network"):
        prepare(_Bare(source), ("depth",), {}, {}, tmp_path / "pools", {})
    found = prepare(source, ("sketch",), {}, {}, tmp_path / "pools", {})
    assert len(found["image"]) == 70
    assert len(list((tmp_path / "pools").iterdir())) == 1


def test_runs_share_a_folder_of_pools(source, tmp_path):
    """Each source has its own there, and another seed's scenes are another source."""
    pools = tmp_path / "pools"
    for one in (source, open_source("scenes:70", size=64, seed=1), source):
        found = prepare(one, ("sketch",), {}, {}, pools, {})
        np.testing.assert_array_equal(found["image"][:3], one.batch(range(3))["image"])
    assert len(list(pools.iterdir())) == 2


class _Bare(Source):
    """A source that knows nothing but its images."""

    def __init__(self, source):
        self._source, self.name, self.size = source, "bare", source.size

    def __len__(self):
        return len(self._source)

    def batch(self, indices):
        return {"image": self._source.batch(indices)["image"], "given": {}}
