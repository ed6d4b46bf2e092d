"""Model directories: whole or refused, in one line."""

import json
import shutil

import numpy as np
import pytest

from composer_jax.models.files import in_memory, module_tensors, open_tensors, write_tensors
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.models import load_model

pytestmark = pytest.mark.fast


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run / "model", tmp_path / "copy")


def test_a_workdir_and_its_model_are_the_same(run):
    one, other = load_model(run), load_model(run / "model")
    a, b = module_tensors(one.composer), module_tensors(other.composer)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name].read(), b[name].read()) for name in a)
    assert one.info["image_size"] == 64 and len(one.composer.config.conditions) == 8


def test_files_have_the_usual_permissions(run, tmp_path):
    (tmp_path / "usual").touch()
    weights = run / "model" / "unet.safetensors"
    assert weights.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_broken_models_are_named(copy, tmp_path):
    read = {name: t.read() for name, t in open_tensors(copy / "unet.safetensors").items()}
    tensors, zeros = (
        {k: in_memory(array) for k, array in read.items()},
        in_memory(np.zeros(3, np.float32)),
    )
    name = "unet.conv_in.bias"
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != name}, rf"lacks the tensor {name}"),
        (
            tensors | {name: zeros},
            rf"{name} is \[3\], the model wants \[16\]",
        ),
        (tensors | {"more": zeros}, "the model lacks: more"),
    ]:
        write_tensors(copy / "unet.safetensors", changed)
        with pytest.raises(ValueError, match=message):
            load_model(copy)
    (copy / "unet.safetensors").write_bytes(b"\x09\x00\x00\x00\x00\x00\x00\x00nonsense!")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(copy)
    (copy / "unet.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet\.safetensors is missing"):
        load_model(copy)
    info = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_model(copy)
    with pytest.raises(ValueError, match=r"has no model\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("model.json", ("process",)),
        ("model.json", ("process", "prediction")),
        ("model.json", ("sampler",)),
        ("model.json", ("image_size",)),
        ("model.json", ("absent", "depth")),
        ("model.json", ("composer", "unet")),
        ("model.json", ("composer", "unet", "heads")),
        ("vae/config.json", ("latent_mean",)),
        ("vae/config.json", ("block_out_channels",)),
    ],
)
def test_a_wrong_value_is_named_with_its_file(copy, name, keys):
    path = copy / name
    content = json.loads(path.read_text())
    for wrong in ("x", None, [{}]):
        node = changed = json.loads(json.dumps(content))
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = wrong
        path.unlink()
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=name) as caught:
            Pipeline.load(copy)
        assert "\n" not in str(caught.value)
