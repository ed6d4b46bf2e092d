"""Depth networks on disk: transformers' two families, our layout, and all that can be wrong."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_jax.models.dpt import DPT
from composer_jax.models.dpt_files import RULES, load_dpt, open_dpt, read_config
from composer_jax.models.files import (
    in_memory,
    module_tensors,
    open_tensors,
    write_tensors,
)
from composer_jax.models.initializers import abstract
from composer_jax.models.peers import to_peer
from composer_jax.utils.atomic import write_json

pytestmark = pytest.mark.fast

DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 1.5,
    "image_size": 20,
    "patch_size": 4,
    "out_features": ["stage1", "stage2"],
    "out_indices": [1, 2],
    "reshape_hidden_states": False,
}
NECK = {"neck_hidden_sizes": [4, 6], "reassemble_factors": [2, 0.5], "fusion_hidden_size": 8}
CONFIGS = {
    "depth_anything": {
        "model_type": "depth_anything",
        "backbone_config": DINOV2,
        "patch_size": 4,
        "reassemble_hidden_size": 16,
        "head_hidden_size": 5,
        "max_depth": None,
        **NECK,
    },
    "dpt": {
        "model_type": "dpt",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 20,
        "patch_size": 4,
        "backbone_out_indices": [0, 1],
        **NECK,
    },
}
PROCESSOR = {"size": {"height": 20, "width": 20}, "ensure_multiple_of": 4, "do_pad": False}
UNUSED = {
    "depth_anything": {
        "backbone.embeddings.mask_token": (1, 16),
        "neck.fusion_stage.layers.0.residual_layer1.convolution1.weight": (8, 8, 3, 3),
    },
    "dpt": {"dpt.layernorm.weight": (16,), "dpt.layernorm.bias": (16,)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory of each family as transformers saves it, random weights."""
    found = {}
    for family, values in CONFIGS.items():
        folder = tmp_path_factory.mktemp(family)
        write_json(folder / "config.json", values)
        write_json(folder / "preprocessor_config.json", PROCESSOR)
        config = read_config(values, PROCESSOR)
        network = abstract(DPT, config)
        draw = np.random.default_rng(0)
        arrays = {
            name: draw.normal(0, 0.3, tensor.shape).astype(np.float32)
            for name, tensor in module_tensors(network).items()
        }
        tensors = to_peer({n: in_memory(a) for n, a in arrays.items()}, RULES[family])
        tensors |= {n: in_memory(np.ones(s, np.float32)) for n, s in UNUSED[family].items()}
        write_tensors(folder / "model.safetensors", tensors)
        found[family] = folder, arrays
    return found


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of Depth Anything's, to break."""
    return shutil.copytree(folders["depth_anything"][0], tmp_path / "network")


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_arrive_where_they_belong(folders, family, tmp_path):
    folder, arrays = folders[family]
    network = load_dpt(folder)
    found = module_tensors(network)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].read(), array)
    config, tensors = open_dpt(folder)
    write_json(tmp_path / "config.json", {"format": 1, "kind": "dpt", **config.to_dict()})
    write_tensors(tmp_path / "model.safetensors", tensors)
    again = load_dpt(tmp_path)
    assert again.config == network.config
    for name, array in module_tensors(again).items():
        np.testing.assert_array_equal(array.read(), arrays[name])


def test_names_are_those_that_transformers_gives():
    """Of depth-anything/Depth-Anything-V2-Small-hf and Intel/dpt-large; parity/ asks for all."""
    layer, peers = "backbone.layers.3", "backbone.encoder.layer.3"
    stage = "neck.reassemble_stage"
    for family, ours, theirs in [
        ("depth_anything", f"{layer}.layer_scale2", f"{peers}.layer_scale2.lambda1"),
        ("depth_anything", f"{layer}.layer_norm1.scale", f"{peers}.norm1.weight"),
        ("depth_anything", "reassemble.0.resize.up_kernel", f"{stage}.layers.0.resize.weight"),
        ("dpt", f"{layer}.mlp.fc2.bias", "dpt.encoder.layer.3.output.dense.bias"),
        ("dpt", "backbone.cls_token", "dpt.embeddings.cls_token"),
        ("dpt", "reassemble.2.readout.kernel", f"{stage}.readout_projects.2.0.weight"),
        ("dpt", "head.conv3.kernel", "head.head.4.weight"),
    ]:
        assert list(to_peer({ours: in_memory(np.zeros(()))}, RULES[family])) == [theirs]


def test_a_config_without_details_is_that_of_transformers_defaults():
    config = read_config({"model_type": "dpt"}, None)
    assert (config.width, config.taps, config.grid, config.eps) == (768, (3, 6, 9, 12), 24, 1e-12)
    assert config.preprocess.size == (384, 384) and config.preprocess.mean == (0.5,) * 3
    small = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
    small |= {"model_type": "dinov2", "out_indices": [3, 6, 9, 12]}
    from composer_jax.models.dpt import DPTConfig

    assert read_config({"model_type": "depth_anything", "backbone_config": small}, None) == (
        DPTConfig()
    )


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model_type", "zoedepth", "model_type is 'zoedepth'; allowed: depth_anything, dpt"),
        ("model_type", ["dpt"], "model_type is"),
        ("is_hybrid", True, "is_hybrid is True"),
        ("backbone_config", {"model_type": "dinov2"}, "backbone_config is"),
        ("use_batch_norm_in_fusion_residual", True, "use_batch_norm_in_fusion_residual is True"),
        ("use_bias_in_fusion_residual", False, "use_bias_in_fusion_residual is False"),
        ("add_projection", True, "add_projection is True"),
        ("readout_type", "max", "readout_type is 'max'; allowed: 'project', 'add', 'ignore'"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("qkv_bias", False, "qkv_bias is False"),
        ("head_in_index", 0, "head_in_index is 0"),
        ("num_attention_heads", "2", "num_attention_heads is '2', not a whole number"),
        ("num_hidden_layers", 3, "backbone_out_indices ends with layer 2"),
        ("hidden_size", 10**30, "hidden_size is"),
    ],
)
def test_what_dpt_cannot_be_is_refused_by_its_key(key, value, words):
    with pytest.raises(ValueError, match=words):
        read_config(CONFIGS["dpt"] | {key: value}, PROCESSOR)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model_type", "swinv2", "backbone_config.model_type is 'swinv2'"),
        ("use_swiglu_ffn", True, "backbone_config.use_swiglu_ffn is True"),
        ("out_features", ["stem", "stage2"], "out_features has 'stem'"),
        ("patch_size", 5, "patch_size is 4; allowed: 5"),
        ("hidden_size", 32, "reassemble_hidden_size is 16; allowed: 32"),
        ("image_size", [20, 20], "backbone_config.image_size is"),
    ],
)
def test_what_dinov2_cannot_be_is_refused_by_its_key(key, value, words):
    values = CONFIGS["depth_anything"] | {"backbone_config": DINOV2 | {key: value}}
    with pytest.raises(ValueError, match=words):
        read_config(values, PROCESSOR)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("do_pad", True, "do_pad is True"),
        ("do_resize", False, "do_resize is False"),
        ("size", {"shortest_edge": 3}, "size has no height"),
        ("size", "large", "size.height is 'large'"),
        ("resample", 7, "resample is 7"),
        ("image_std", [0.0, 1.0, 1.0], "image_std is 0.0"),
    ],
)
def test_images_cannot_be_made_otherwise(key, value, words):
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {words}"):
        read_config(CONFIGS["dpt"], PROCESSOR | {key: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_gives_a_config_or_a_value_error(data):
    values = json.loads(json.dumps(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]))
    processor = dict(PROCESSOR)
    inner = values.get("backbone_config", values)
    ours = {"format": 1, "kind": "dpt", **read_config(values, processor).to_dict()}
    where = data.draw(st.sampled_from([values, inner, processor, processor["size"], ours]))
    changed = dict(where) | {data.draw(st.sampled_from(sorted(where))): data.draw(JSON)}
    for config, images in [
        (changed if where is values or where is ours else values, processor),
        (values | {"backbone_config": changed}, processor),
        (values, changed if where is processor else processor | {"size": changed}),
    ]:
        try:
            read_config(config, images)
        except ValueError as error:
            assert "\n" not in str(error)


def broken(folder, change):
    """The folder with other tensors: `change(names to tensors)` gives them."""
    path = folder / "model.safetensors"
    tensors = {name: in_memory(t.read()) for name, t in open_tensors(path).items()}
    write_tensors(path, change(tensors))
    return folder


def test_a_tensor_that_is_not_right_is_named(folder, folders):
    name = "backbone.encoder.layer.1.attention.attention.key.weight"
    narrow = in_memory(np.ones((16, 8), np.float32))
    unknown = in_memory(np.full((16, 16), np.nan, np.float32))
    for change, words in [
        (lambda t: {n: v for n, v in t.items() if n != name}, rf"lacks the tensor {name} \[16, 16"),
        (lambda t: {n.replace("1.attention", "1.attn"): t[n] for n in t}, "lacks the tensor"),
        (lambda t: t | {name: narrow}, rf"{name} is \[16, 8\], the model wants \[16, 16\]"),
        (lambda t: t | {"pooler.weight": t[name]}, "that the model lacks: pooler.weight"),
        (lambda t: t | {name: unknown}, "not finite"),
    ]:
        shutil.copy(folders["depth_anything"][0] / "model.safetensors", folder)
        with pytest.raises(ValueError, match=words):
            load_dpt(broken(folder, change))


def test_a_directory_that_is_not_whole_is_one_line(folder, tmp_path):
    outside = tmp_path / "config.json"
    shutil.move(folder / "config.json", outside)
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        load_dpt(folder)
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of its directory"):
        load_dpt(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_dpt(folder)
    shutil.copy(outside, folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        load_dpt(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle"):
        load_dpt(folder)
    with pytest.raises(ValueError, match="no such directory, and no hub name"):
        load_dpt(tmp_path / "nowhere")


def test_ours_is_of_one_format(folder):
    config, _ = open_dpt(folder)
    write_json(folder / "config.json", {"format": 2, "kind": "dpt", **config.to_dict()})
    with pytest.raises(ValueError, match="format is 2; this version reads 1"):
        load_dpt(folder)
