"""`composer decompose` with a depth network: ours, a peer's, and what is none."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from composer_jax import conditions
from composer_jax.cli import main
from composer_jax.commands.decompose import decompose, stored_files
from composer_jax.data.sources import open_source
from composer_jax.data.tools import load_tools
from composer_jax.models.dpt import DPT, DPTConfig, Preprocess
from composer_jax.models.files import module_tensors, write_tensors
from composer_jax.models.initializers import described, initialised
from composer_jax.storage.models import BUNDLED
from composer_jax.utils.atomic import write_json
from composer_jax.utils.owned import write_files
from tests.disks import file_limit


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(skimage.data.coffee()).resize((61, 43)).save(path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A tiny depth network in our layout."""
    folder = tmp_path_factory.mktemp("depth")
    shape = {"grid": 3, "patch": 4, "width": 8, "hidden": 8, "heads": 1, "taps": (1,)}
    neck = {"factors": (1.0,), "neck_widths": (4,), "fusion_width": 4, "head_width": 4}
    images = Preprocess(size=(16, 16), multiple=4)
    config = DPTConfig(**shape, **neck, preprocess=images)
    write_json(folder / "config.json", {"format": 1, "kind": "dpt", **config.to_dict()})
    write_tensors(
        folder / "model.safetensors", module_tensors(initialised(described(DPT, config), 0))
    )
    return folder


@pytest.mark.parametrize("which", ["bundled", "folder", "network"])
def test_depth_comes_from_a_photo_of_any_size(photo, network, tmp_path, which):
    weights = {"bundled": "bundled", "folder": BUNDLED / "depth", "network": network}[which]
    words = ["decompose", photo, "--only", "depth", "--depth-weights", weights]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    depth = np.load(tmp_path / "out" / "photo" / "depth.npy")
    assert depth.shape == (43, 61) and depth.dtype == np.uint16
    picture = conditions.load_image(tmp_path / "out" / "photo" / "depth.png")
    assert picture.shape == (43, 61, 3)
    if which != "network":
        assert depth.min() == 0 and depth.max() == 65535


@pytest.mark.parametrize(
    "weights, words",
    [
        (str(BUNDLED / "vae"), "holds no depth network"),
        (str(BUNDLED / "clip"), "model_type is 'clip'; allowed: depth_anything, dpt"),
        ("EMPTY", "holds no depth/config.json"),
        ("PHOTO", "holds no depth/config.json"),
        ("no/such/folder", "no such directory, and no hub name"),
    ],
)
def test_what_is_no_depth_network_is_one_line(photo, tmp_path, capsys, weights, words):
    (tmp_path / "empty").mkdir()
    weights = {"EMPTY": tmp_path / "empty", "PHOTO": photo}.get(weights, weights)
    out = tmp_path / "out"
    given = ["decompose", photo, "--depth-weights", weights, "--out", out]
    assert main([*map(str, given)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not out.exists()


def test_without_a_depth_network_the_reason_is_said(photo, tmp_path, capsys):
    given = ["decompose", photo, "--only", "depth", "--out", tmp_path / "out"]
    assert main([*map(str, given)]) == 2
    assert "a depth network" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tools():
    return load_tools(clip="bundled")


@pytest.fixture(scope="module")
def written(tmp_path_factory, tools):
    """A scene taken apart into every condition that is known, and the folder these are in."""
    batch = open_source("scenes:1", size=64).batch([0])
    given = {name: value[0] for name, value in batch["given"].items()}
    stored = decompose(batch["image"][0], given=given, tools=tools)
    assert set(stored) == set(conditions.names())
    folder = tmp_path_factory.mktemp("written")
    write_files(folder, stored_files(stored))
    return folder, stored


def same(name, a, b):
    if not isinstance(a, dict):
        return np.testing.assert_array_equal(a, b)
    assert set(a) == set(b)
    for key in a:
        if (name, key) == ("instances", "classes"):  # those of ids that are not in the picture
            there = np.unique(b["ids"])
            np.testing.assert_array_equal(a[key][there], b[key][there])
        else:
            np.testing.assert_array_equal(a[key], b[key], err_msg=f"{name} {key}")


@pytest.mark.parametrize("name", conditions.names())
def test_what_decompose_writes_is_read_back(written, tools, name):
    folder, stored = written
    condition = conditions.get(name)
    tool = tools.get(condition.tool)
    same(name, condition.parse(str(folder / f"{name}.npy"), tool), stored[name])
    same(name, condition.parse(folder / f"{name}.npy", tool), stored[name])
    if isinstance(stored[name], dict):
        same(name, condition.parse(stored[name], tool), stored[name])
    picture = str(folder / f"{name}.png")
    if name in ("caption", "semantics"):  # a picture holds neither
        with pytest.raises(ValueError, match=r"\.npy") as error:
            condition.parse(picture, tool)
        assert picture in str(error.value) and "\n" not in str(error.value)
    elif name == "palette":
        found = condition.parse(picture, tool)
        np.testing.assert_allclose(found, stored[name], atol=1 / 2**14)
    else:
        same(name, condition.parse(picture, tool), stored[name])


@pytest.mark.parametrize("kind", ["npy", "png"])
def test_sample_reads_all_that_decompose_writes(written, run, tmp_path, capsys, kind):
    folder, stored = written
    names = [name for name in stored if kind == "npy" or name not in ("caption", "semantics")]
    words = ["sample", "--model", run, "--steps", 1, "--count", 1, "--out", tmp_path / "out"]
    for name in names:
        words += [f"--{name}", folder / f"{name}.{kind}"]
    assert main([*map(str, words)]) == 0
    assert f"given {', '.join(names)}" in capsys.readouterr().out


def test_a_logo_has_the_colours_that_are_painted(tmp_path, capsys):
    logo = np.zeros((64, 64, 4), np.uint8)
    logo[16:48, 16:48] = 214, 40, 40, 255
    Image.fromarray(logo).save(tmp_path / "logo.png")
    words = ["decompose", tmp_path / "logo.png", "--only", "palette", "--out", tmp_path / "out"]
    assert main([*map(str, words)]) == 0
    palette = np.load(tmp_path / "out" / "logo" / "palette.npy")
    assert palette.max() == 1.0
    np.testing.assert_array_equal(palette, conditions.get("palette").parse("#d62828"))


def test_a_map_of_distance_is_inverted_by_a_switch(written, run, tmp_path, capsys):
    folder, stored = written
    Image.fromarray(np.uint16(65535) - stored["depth"]).save(tmp_path / "far.png")
    words = ["sample", "--model", run, "--steps", 1, "--count", 1]
    near = ["--depth", folder / "depth.npy", "--out", tmp_path / "near"]
    far = ["--depth", tmp_path / "far.png", "--depth.invert", "--out", tmp_path / "far"]
    for more in (near, far):
        assert main([*map(str, [*words, *more])]) == 0
    images = [(tmp_path / name / "0000.png").read_bytes() for name in ("near", "far")]
    assert images[0] == images[1]
    assert main([*map(str, [*words, "--depth.invert", "--out", tmp_path / "no"])]) == 2
    assert "--depth.invert is for --depth" in capsys.readouterr().err


def tree(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def grey(path):
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("name", ["a/palette.png", "a/palette.npy", "contact_sheet.png"])
def test_nothing_that_others_wrote_is_written_over(tmp_path, capsys, name):
    words = ["decompose", grey(tmp_path / "a.png"), "--only", "palette,sketch", "--out"]
    out = tmp_path / "out"
    assert main([*words, str(out)]) == 0
    assert main([*words, str(out), "--only", "palette"]) == 0  # ours
    (out / name).write_text("mine")
    before = tree(tmp_path)
    assert main([*words, str(out)]) == 2
    assert f"out holds {name}, which composer did not write" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_sheet_that_is_taken_apart_is_not_written_over(tmp_path, capsys):
    words = ["decompose", "--only", "palette", "--out", str(tmp_path)]
    assert main([*words, grey(tmp_path / "a.png")]) == 0
    before = tree(tmp_path)
    assert main([*words, str(tmp_path / "contact_sheet.png")]) == 2
    assert "contact_sheet.png is what is read" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("size", [0, 150, 400])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys, size):
    words = ["decompose", grey(tmp_path / "a.png"), "--only", "palette", "--out"]
    with file_limit(size):
        assert main([*words, str(tmp_path / "b/out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path}/b/out/" in error and "file system" in error
    assert main([*words, str(tmp_path / "b/out")]) == 0
