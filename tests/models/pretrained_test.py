"""Stable Diffusion's layouts: read whole, in every form they come in, or refused in one line."""

import json
import re

import numpy as np
import pytest
from flax import nnx

from composer_jax.models.files import (
    Tensor,
    in_memory,
    module_tensors,
    open_tensors,
    write_tensors,
)
from composer_jax.models.layouts import (
    compvis_unet_rules,
    compvis_vae_rules,
    unet_from_diffusers,
    unet_to_diffusers,
    vae_from_diffusers,
    vae_to_diffusers,
)
from composer_jax.models.peers import to_peer
from composer_jax.models.pretrained import kinds_in, open_unet, open_vae
from composer_jax.models.unet import PRESETS, UNet, UNetConfig
from composer_jax.models.vae import VAE, VAEConfig
from composer_jax.utils.atomic import write_json

UNET = UNetConfig(
    block_out_channels=(32, 64, 64),
    attention=(True, True, False),
    heads=(8, 8, 8),
    layers_per_block=1,
    cross_attention_dim=12,
)
CODEC = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def networks(drawn):
    return {
        "unet": drawn(UNet, UNET, seed=1),
        "vae": drawn(VAE, CODEC, seed=2),
    }


@pytest.fixture
def sd(networks, save_sd, tmp_path):
    """A directory of diffusers."""
    return save_sd(tmp_path, networks["unet"], networks["vae"])


def same(found, module) -> bool:
    wanted = module_tensors(module)
    read = {name: tensor.read() for name, tensor in found.tensors.items()}
    return read.keys() == wanted.keys() and all(
        np.array_equal(read[name], wanted[name].read()) for name in wanted
    )


def change(path, edit) -> None:
    """Rewrites a file of tensors, read into memory first."""
    tensors = {name: in_memory(tensor.read()) for name, tensor in open_tensors(path).items()}
    write_tensors(path, edit(tensors))


def test_directories_of_diffusers(sd, networks):
    unet, vae = open_unet(sd), open_vae(sd)
    assert same(unet, networks["unet"]) and same(vae, networks["vae"])
    assert unet.config == UNET and vae.config == CODEC
    assert kinds_in(sd) == ["unet", "vae"]
    assert same(open_vae(sd / "vae"), networks["vae"])  # a codec on its own
    x = np.ones((1, 8, 8, 4), np.float32)
    args = x, np.ones(1, np.float32), np.ones((1, 3, 12), np.float32)
    outputs = [nnx.jit(UNet.__call__)(net, *args) for net in (unet.load(), networks["unet"])]
    np.testing.assert_array_equal(*outputs)


def test_single_files_of_compvis(sd, networks, tmp_path):
    path = tmp_path / "v1.safetensors"
    tensors = to_peer(module_tensors(networks["unet"]), compvis_unet_rules(UNET))
    tensors |= to_peer(module_tensors(networks["vae"]), compvis_vae_rules(CODEC))
    # as published: attention of the codec as 1 x 1 convolutions, and much that is neither
    tensors = {
        name: t.apply(lambda a: a[..., None, None]) if "attn_1" in name and len(t.shape) == 2 else t
        for name, t in tensors.items()
    }
    one = in_memory(np.ones(1, np.float32))
    more = {"alphas_cumprod": one, "first_stage_model.loss.logvar": one}
    write_tensors(path, tensors | more)
    unet, vae = open_unet(path), open_vae(path)
    assert same(unet, networks["unet"]) and same(vae, networks["vae"])
    assert unet.config == UNET and unet.process["prediction"] == "eps"
    assert kinds_in(path) == ["unet", "vae"]
    write_tensors(path, more)
    with pytest.raises(ValueError, match=r"holds no unet: no tensor is named model\.diffusion"):
        open_unet(path)


def test_other_forms_of_the_same_weights(sd, networks):
    path = sd / "vae" / WEIGHTS
    whole = {name: in_memory(tensor.read()) for name, tensor in open_tensors(path).items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    before = {re.sub("to_[qkv]|to_out.0", lambda m: old[m[0]], k): t for k, t in whole.items()}
    assert before.keys() != whole.keys()
    write_tensors(path, before)
    assert same(open_vae(sd), networks["vae"])  # the first releases' names
    path.unlink()
    names, places = list(whole), {}
    for i, part in enumerate((names[::2], names[1::2])):
        write_tensors(sd / "vae" / f"part{i}.safetensors", {name: whole[name] for name in part})
        places |= dict.fromkeys(part, f"part{i}.safetensors")
    write_json(sd / "vae" / f"{WEIGHTS}.index.json", {"weight_map": places})
    assert same(open_vae(sd), networks["vae"])  # shards
    (sd / "vae" / f"{WEIGHTS}.index.json").unlink()
    half = {name: tensor.cast("bfloat16") for name, tensor in whole.items()}
    write_tensors(path.with_name(WEIGHTS.replace(".safe", ".bf16.safe")), half)
    loaded = module_tensors(open_vae(sd).load())
    for name, tensor in module_tensors(networks["vae"]).items():
        np.testing.assert_allclose(loaded[name].read(), tensor.read(), rtol=2**-8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"},
         r"lacks the tensor conv_in\.bias \[32\]"),
        (lambda t: t | {"extra": in_memory(np.zeros(3, np.float32))},
         r"has a tensor that the model lacks: extra \[3\]"),
        (lambda t: t | {"conv_in.weight": in_memory(np.zeros((32, 9, 3, 3), np.float32))},
         r"conv_in\.weight is \[32, 9, 3, 3\], the model wants \[32, 4, 3, 3\]"),
        (lambda t: t | {"conv_out.weight": t["conv_out.weight"].apply(lambda a: a.swapaxes(0, 1))},
         r"conv_out\.weight is \[32, 4, 3, 3\], the model wants \[4, 32, 3, 3\]"),
        (lambda t: t | {"conv_in.bias": in_memory(np.full(32, np.inf, np.float32))},
         r"conv_in\.bias holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(sd, edit, message):
    change(sd / "unet" / WEIGHTS, edit)
    with pytest.raises(ValueError, match=message):
        open_unet(sd).load()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "gelu", "act_fn is 'gelu'; only 'silu' is known"),
        ("class_embed_type", "timestep", "class_embed_type is 'timestep', which this network"),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"] * 3, "down_block_types has 'Simple"),
        ("up_block_types", ["UpBlock2D"] * 3, "up_block_types is"),
        ("transformer_layers_per_block", [1, 2, 10], "transformer_layers_per_block is"),
        ("block_out_channels", "wide", "block_out_channels is 'wide'"),
        ("block_out_channels", [32, 64, 10**12], "block_out_channels is 1000000000000"),
        ("layers_per_block", 10**9, "a whole number from 1 to 64"),
        ("block_out_channels", [32, 64], "block_out_channels|one bool a level"),
        ("layers_per_block", 1.5, "layers_per_block is 1.5"),
        ("attention_head_dim", [8, 8], "heads is"),
        ("attention_head_dim", 7, "no multiple of 7 heads"),
        ("attention_head_dim", None, "heads is|is broken"),
        ("norm_num_groups", 5, "no multiple of 5 groups"),
        ("_class_name", "UNet3D", "is of a 'UNet3D'; UNet2DConditionModel is wanted"),
        ("widths", 3, "widths is 3, which this network has not"),
        ("down_block_types", 5, "is broken"),
    ],
)
def test_configs_of_other_networks_are_refused(sd, key, value, message):
    path = sd / "unet" / "config.json"
    write_json(path, json.loads(path.read_text()) | {key: value})
    with pytest.raises(ValueError, match=message):
        open_unet(sd)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scaling_factor", 0), ("scaling_factor", float("nan")), ("latent_channels", 10**12),
     ("latents_std", [0, 1, 1, 1]), ("latents_mean", "0"), ("block_out_channels", 3),
     ("layers_per_block", True), ("_class_name", ["AutoencoderKL"])],
)  # fmt: skip
def test_codecs_that_cannot_be_are_refused(sd, key, value):
    path = sd / "vae" / "config.json"
    write_json(path, json.loads(path.read_text()) | {key: value})
    with pytest.raises(ValueError, match=r"vae.config\.json"):
        open_vae(sd)


def test_no_changed_byte_crashes(sd, networks):
    rng = np.random.default_rng(0)
    for file in (sd / "vae" / "config.json", sd / "vae" / WEIGHTS):
        whole = file.read_bytes()
        for _ in range(40):
            broken = bytearray(whole)
            # most bytes are numbers: look at the header as often as at them
            end = len(whole) if rng.random() < 0.5 else min(len(whole), 8000)
            broken[rng.integers(end)] ^= int(rng.integers(1, 256))
            file.write_bytes(broken)
            try:
                found = same(open_vae(sd), networks["vae"])
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert found
        file.write_bytes(whole)


def test_configs_survive_the_way_there_and_back():
    for name in ("sd15", "sd21"):
        assert unet_from_diffusers(unet_to_diffusers(PRESETS[name])) == PRESETS[name]
    codec = VAEConfig(latent_mean=(0.1, 0.2, 0.3, 0.4), latent_std=(1.0, 2.0, 3.0, 4.0))
    for config in (codec, VAEConfig()):
        assert vae_from_diffusers(vae_to_diffusers(config)) == config
    with pytest.raises(ValueError, match="patch 2 has no counterpart"):
        unet_to_diffusers(PRESETS["tiny"])


def test_defaults_of_diffusers_stand_in_for_old_configs():
    old = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2",
           "cross_attention_dim": 768, "sample_size": 64}  # fmt: skip
    assert unet_from_diffusers(old) == PRESETS["sd15"]


def test_nowhere_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"unet nowhere: no such directory, and no hub name"):
        open_unet("nowhere")
    with pytest.raises(ValueError, match=r"lacks unet/config\.json"):
        open_unet(tmp_path)


def test_a_tensor_knows_its_shape_unread():
    def never():
        raise AssertionError("read")

    tensor = Tensor((2, 3, 1, 1), np.dtype("float32"), never)
    assert tensor.apply(lambda array: array.reshape(2, 3).T).shape == (3, 2)
