"""Stable Diffusion's layouts: read whole, in every form they come in, or refused in one line."""

import json
import re
from dataclasses import replace

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
from composer_jax.models.initializers import abstract
from composer_jax.models.layouts import (
    COMPVIS_PREFIX,
    compvis_unet_rules,
    compvis_vae_rules,
    unet_from_diffusers,
    unet_to_diffusers,
    vae_from_diffusers,
    vae_to_diffusers,
)
from composer_jax.models.peers import to_peer
from composer_jax.models.pretrained import kinds_in, left_out, open_unet, open_vae
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


@pytest.mark.parametrize(
    ("channels", "message"),
    [(9, "is an inpainting UNet"), (8, "is a UNet of InstructPix2Pix's kind"),
     (7, "is an upscaler's UNet"), (5, "is a depth-to-image UNet"), (20, "with further inputs")],
)  # fmt: skip
def test_unets_that_take_more_than_a_latent_are_named(sd, tmp_path, channels, message):
    """As a folder and as a single file, before anything is read."""
    path, wanted = sd / "unet" / "config.json", message + rf".*{channels} channels and gives 4"
    write_json(path, json.loads(path.read_text()) | {"in_channels": channels})
    with pytest.raises(ValueError, match=wanted):
        open_unet(sd)
    unread = {n: Tensor(t.shape, t.dtype, None) for n, t in module_tensors(
        abstract(UNet, replace(UNET, in_channels=channels))).items()}  # fmt: skip
    single = {n: in_memory(np.zeros(t.shape, np.float32))
              for n, t in to_peer(unread, compvis_unet_rules(UNET)).items()}  # fmt: skip
    write_tensors(tmp_path / "one.safetensors", single)
    with pytest.raises(ValueError, match=wanted):
        open_unet(tmp_path / "one.safetensors")


def test_networks_in_files_of_their_own_have_no_prefix(networks, tmp_path):
    for name, rules, config, open_it in (
        ("unet", compvis_unet_rules, UNET, open_unet),
        ("vae", compvis_vae_rules, CODEC, open_vae),
    ):
        tensors = to_peer(module_tensors(networks[name]), rules(config))
        prefix = COMPVIS_PREFIX[name]
        bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        more = {"loss.logvar": in_memory(np.ones(1, np.float32))}
        path = tmp_path / f"{name}.safetensors"
        write_tensors(path, bare | more)
        assert same(open_it(path), networks[name]) and kinds_in(path) == [name]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a transformer"),
        ("double_blocks.0.img_attn.qkv.weight", "a transformer"),
        ("conditioner.embedders.0.transformer.weight", "Stable Diffusion XL"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("emb_params", "an embedding of textual inversion"),
        ("down_blocks.0.resnets.0.conv1.weight", "give the folder with both"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder"),
    ],
)
def test_single_files_of_other_models_are_named(tmp_path, name, what):
    path = tmp_path / "one.safetensors"
    write_tensors(path, {name: in_memory(np.ones((2, 2), np.float32))})
    with pytest.raises(ValueError, match=f"seems to be .*{what}"):
        open_unet(path)


@pytest.mark.parametrize("name", ["w.msgpack", "w.h5", "w.gguf", "w", "w.zip"])
def test_single_files_of_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(ValueError, match=r"is no \.safetensors file, and no other single file"):
        open_vae(tmp_path / name)


def test_folders_of_other_models_are_named(sd, tmp_path):
    flux = tmp_path / "flux"
    (flux / "transformer").mkdir(parents=True)
    write_json(flux / "model_index.json", {"_class_name": "FluxPipeline",
                                           "transformer": ["diffusers", "Flux"]})  # fmt: skip
    with pytest.raises(ValueError, match="FluxPipeline has a transformer, which"):
        open_unet(flux)
    path = sd / "unet" / "config.json"
    write_json(path, json.loads(path.read_text()) | {"addition_embed_type": "text_time"})
    with pytest.raises(ValueError, match="it is Stable Diffusion XL's"):
        open_unet(sd)


def test_a_network_that_the_index_promises_is_missed(sd):
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "safety_checker": [None, None], "tokenizer": ["transformers", "CLIP"]}  # fmt: skip
    write_json(sd / "model_index.json", index)
    assert kinds_in(sd) == ["unet", "vae"] and left_out(sd) == "the tokenizer"
    (sd / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks unet/config\.json, .*; --only vae would take"):
        kinds_in(sd)


def test_what_of_a_single_file_is_left_out(tmp_path):
    names = ("model_ema.diffusion_modelx", "cond_stage_model.transformer.a", "alphas_cumprod")
    one = in_memory(np.ones(1, np.float32))
    write_tensors(tmp_path / "one.safetensors", dict.fromkeys(names, one))
    assert left_out(tmp_path / "one.safetensors") == "the moving average, the text encoder"
