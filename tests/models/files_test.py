"""A model's files: whole, ours or refused; nothing changed goes unseen in what we write."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from composer_jax.models.files import (
    in_memory,
    member,
    open_tensors,
    read_json,
    write_tensors,
)
from composer_jax.models.weight_files import find_weights

pytestmark = pytest.mark.fast

ARRAYS = {
    "a.kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b.bias": np.linspace(-1, 1, 5).astype(np.float16),
    "c": np.asarray([1.5, -2.0], jnp.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(0.25).reshape(()),
}


def read(path, root=None):
    return {name: tensor.read() for name, tensor in open_tensors(path, root).items()}


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.safetensors"
    write_tensors(path, {name: in_memory(array) for name, array in ARRAYS.items()})
    return path


@pytest.fixture
def sharded(tmp_path):
    """An index over two files, as diffusers and transformers write it."""
    shards = {"m-00001-of-00002.safetensors": ["a.kernel"], "m-00002-of-00002.safetensors": ["c"]}
    for file, names in shards.items():
        save_file({name: ARRAYS[name] for name in names}, tmp_path / file)
    places = {name: file for file, names in shards.items() for name in names}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": places}))
    return index


def test_what_is_written_is_read_by_us_and_by_the_library(ours):
    for found in (read(ours), load_file(ours)):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            np.testing.assert_array_equal(found[name], array)


def test_damage_in_files_without_checksums_is_seen_where_it_shows(tmp_path):
    """200 bytes of a file that a peer saved: some of them make numbers that no network holds."""
    path, rng = tmp_path / "theirs.safetensors", np.random.default_rng(0)
    for seed in range(20):
        weights = np.random.default_rng(seed).standard_normal(10_000, np.float32) / 50
        save_file({"w": weights}, path)
        broken = bytearray(path.read_bytes())
        for place in rng.integers(200, len(broken), 200):
            broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not finite, or beyond 65504"):
            read(path)


def test_any_flipped_byte_of_ours_is_seen(ours):
    whole, rng = ours.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 400):
        broken = bytearray(whole)
        broken[place] ^= int(rng.integers(1, 256))
        ours.write_bytes(broken)
        try:
            found = read(ours)
        except ValueError as error:
            assert "\n" not in str(error) and str(ours) in str(error)
            continue
        # a space of the header became another blank
        assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())


def test_truncated_files_are_named(ours):
    whole = ours.read_bytes()
    for length in range(0, len(whole), 7):
        ours.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"ours\.safetensors is not a whole safetensors file"):
            read(ours)


def header(entries: dict, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        header({"a": entry(shape=(5,))}),
        header({"a": entry(offsets=(0, 32))}),
        header({"a": entry(), "b": entry()}),
        header({"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(3,), offsets=(4, 16))}),
        header({"a": entry(shape=(2,), offsets=(8, 16))}),
        header({"a": entry(shape=(-4,))}),
        header({"a": entry(shape=(2**40, 2**40))}),
        header({"a": entry(dtype="F99")}),
        header({"a": {"dtype": "F32"}}),
        header({"a": entry()}, b"\0" * 24),
        (2**60).to_bytes(8, "little") + b"{}",
        b"",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content):
    path = tmp_path / "liar.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"liar\.safetensors is not a whole safetensors file"):
        read(path)


def test_numbers_that_no_network_holds_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for array, message in [
        (np.float32([1, np.nan]), r"x\.safetensors: tensor w holds numbers that are not finite"),
        (np.float32([1e9, 0]), r"tensor w holds numbers that are not finite, or beyond 65504"),
        (np.int32([1, 2]), r"tensor w is I32; allowed: F32, F16, BF16"),
    ]:
        save_file({"w": array}, path)
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match="too large for float16"):
        in_memory(np.float32([1e6])).cast("float16").read()


def test_shards_are_read_through_their_index(sharded):
    found = read(sharded)
    assert found.keys() == {"a.kernel", "c"}
    np.testing.assert_array_equal(found["a.kernel"], ARRAYS["a.kernel"])
    good = json.loads(sharded.read_text())["weight_map"]
    first = good["a.kernel"]
    for changed, message in [
        (good | {"more": first}, f"places the tensor more in {first}, which lacks it"),
        ({"c": good["c"], "a.kernel": "../m.safetensors"}, "'../m.safetensors' is no file beside"),
        ({"c": good["c"], "a.kernel": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a.kernel": first, "c": first}, "places the tensor c in .*, which lacks it"),
        ({}, "has no weight_map"),
    ]:
        sharded.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            read(sharded)


@pytest.mark.parametrize("name", ["w.ckpt", "w.pt", "w.bin", "w.pkl", "w.PTH"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"is a pickle.*weights_only=True.*'w\.safetensors'"):
        open_tensors(tmp_path / name)


def test_a_pickle_beside_is_told_of(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model\.bin is a pickle"):
        find_weights(tmp_path, "unet/model")
    with pytest.raises(ValueError, match=r"lacks vae/model\.safetensors"):
        find_weights(tmp_path, "vae/model")


def test_links_do_not_lead_out(tmp_path, ours):
    root = tmp_path / "root"
    (root / "unet").mkdir(parents=True)
    os.symlink(ours, root / "unet" / "model.safetensors")
    with pytest.raises(ValueError, match=r"leads out of its directory"):
        find_weights(root, "unet/model")
    os.symlink(tmp_path, root / "vae")
    with pytest.raises(ValueError, match=r"leads out of its directory"):
        member(root, "vae/ours.safetensors")
    # as the hub's cache lies: links from a snapshot into the blobs beside it
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "blobs" / "beef").write_bytes(ours.read_bytes())
    link = repository / "snapshots" / "1" / "model.safetensors"
    os.symlink("../../blobs/beef", link)
    assert find_weights(link.parent, "model") == link


def test_json_that_is_none_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_json(path)
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json is not (a )?JSON"):
            read_json(path)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read_and_written(tmp_path, name):
    dtype, path = jnp.dtype(name), tmp_path / "w.safetensors"
    largest = float(jnp.finfo(dtype).max)
    array = np.asarray([0.5, -largest, 0.0, largest], dtype)
    write_tensors(path, {"a": in_memory(array)})
    np.testing.assert_array_equal(read(path)["a"].astype(np.float32), array.astype(np.float32))
    said = "F8_E4M3" if "e4m3" in name else "F8_E5M2"  # safetensors' names
    assert said.encode() in path.read_bytes()[:300]
    write_tensors(path, {"a": in_memory(np.asarray([np.nan], dtype))})
    with pytest.raises(ValueError, match="numbers that are not finite"):
        read(path)


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    save_file({"a": np.zeros(2, np.float64)}, tmp_path / "w.safetensors")
    tensors = open_tensors(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"tensor a is F64; allowed: F32, F16, BF16, F8_E4M3"):
        write_tensors(tmp_path / "again.safetensors", tensors)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"PK\x03\x04\x00\x00", "a pickle of PyTorch by another name"),
        (b"\x80\x02}q\x00", "a pickle by another name"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"GGUF\x03", "a GGUF file"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"", "not a whole safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, start, what):
    (tmp_path / "w.safetensors").write_bytes(start)
    with pytest.raises(ValueError, match=f"is {what}"):
        open_tensors(tmp_path / "w.safetensors")
