"""`composer decompose` with a depth network: ours, a peer's, and what is none."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from composer_jax import conditions
from composer_jax.cli import main
from composer_jax.models.dpt import DPT, DPTConfig, Preprocess
from composer_jax.models.files import module_tensors, write_tensors
from composer_jax.models.initializers import described, initialised
from composer_jax.storage.models import BUNDLED
from composer_jax.utils.atomic import write_json


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
