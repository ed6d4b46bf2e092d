"""Stable Diffusion's two layouts, diffusers' and CompVis', as our configs and names.

Of diffusers only `config.json` differs, the modules are named alike. CompVis' files number their
blocks and hold no config: names follow from it by a few rules, the config from the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from typing import Any

from composer_jax.models.files import Tensors
from composer_jax.models.peers import Rules
from composer_jax.models.unet import UNetConfig
from composer_jax.models.vae import VAEConfig, check_size

# what our networks do, under diffusers' keys; any other value is another network
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
UNET_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}


def unet_from_diffusers(values: Mapping) -> UNetConfig:
    """The config of `UNet2DConditionModel`'s config.json; raises ValueError naming a key that asks
    for what our UNet does not do."""
    if values.get("addition_embed_type") == "text_time":
        raise ValueError("it is Stable Diffusion XL's; UNets of Stable Diffusion 1 and 2 are read")
    blocks = list(values.get("down_block_types", [*UNET_BLOCKS][:1] * 3 + ["DownBlock2D"]))
    for block in blocks:
        if block not in UNET_BLOCKS:
            allowed = ", ".join(UNET_BLOCKS)
            raise ValueError(f"down_block_types has {block!r}; allowed: {allowed}")
    up = [block.replace("Down", "Up") for block in blocks[::-1]]
    _only(values, "UNet2DConditionModel", UNET_FIXED | {"up_block_types": up}, UNetConfig,
          {"down_block_types", "attention_head_dim", "num_attention_heads", "sample_size",
           "upcast_attention"})  # fmt: skip
    # diffusers says "attention_head_dim" and means the number of heads
    heads = values.get("num_attention_heads") or values.get("attention_head_dim", 8)
    return UNetConfig.from_dict(
        _given(values, UNetConfig, cross_attention_dim=1280)
        | {
            "attention": [UNET_BLOCKS[block] for block in blocks],
            "heads": heads if isinstance(heads, list) else [heads] * len(blocks),
        }
    )


def unet_to_diffusers(config: UNetConfig) -> dict:
    """`UNet2DConditionModel`'s config.json; raises ValueError where diffusers has no such UNet."""
    if config.patch != 1:
        raise ValueError(f"a UNet with patch {config.patch} has no counterpart in diffusers")
    blocks = {on: name for name, on in UNET_BLOCKS.items()}
    down = [blocks[on] for on in config.attention]
    values = config.to_dict()
    for ours in ("patch", "attention", "heads"):
        del values[ours]
    return {
        "_class_name": "UNet2DConditionModel",
        **UNET_FIXED,
        **values,
        "attention_head_dim": list(config.heads),
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in down[::-1]],
    }


def vae_from_diffusers(values: Mapping) -> VAEConfig:
    """The config of `AutoencoderKL`'s config.json; raises ValueError as `unet_from_diffusers`."""
    levels = len(values.get("block_out_channels", (64,)))
    fixed = {
        **VAE_FIXED,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "out_channels": values.get("in_channels", 3),
    }
    free = {"sample_size", "force_upcast", "scaling_factor", "shift_factor", "latents_mean",
            "latents_std", "mid_block_add_attention"}  # fmt: skip
    _only(values, "AutoencoderKL", fixed, VAEConfig, free)
    channels, scale = values.get("latent_channels", 4), values.get("scaling_factor", 0.18215)
    check_size("latent_channels", channels)
    mean = values.get("latents_mean") or [values.get("shift_factor") or 0.0] * channels
    std = values.get("latents_std") or [1.0] * channels
    return VAEConfig.from_dict(
        _given(values, VAEConfig, block_out_channels=[64], layers_per_block=1)
        | {
            "mid_attention": values.get("mid_block_add_attention", True),
            "latent_mean": mean,
            "latent_std": [s / scale for s in std],
        }
    )


def vae_to_diffusers(config: VAEConfig) -> dict:
    """`AutoencoderKL`'s config.json; raises ValueError where diffusers has no such codec."""
    if config.patch != 1 or config.linear_skip:
        raise ValueError("a codec with patches or a linear skip has no counterpart in diffusers")
    levels, values = len(config.block_out_channels), config.to_dict()
    for ours in ("patch", "linear_skip", "mid_attention", "latent_mean", "latent_std"):
        del values[ours]
    alike = len(set(config.latent_std)) == 1 and not any(config.latent_mean)
    latents = (
        {"scaling_factor": 1.0 / config.latent_std[0]}
        if alike
        else {
            "scaling_factor": 1.0,
            "latents_mean": list(config.latent_mean),
            "latents_std": list(config.latent_std),
        }
    )
    return {
        "_class_name": "AutoencoderKL",
        **VAE_FIXED,
        **values,
        **latents,
        "out_channels": config.in_channels,
        "mid_block_add_attention": config.mid_attention,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def new_name(name: str) -> str:
    """Today's name of a tensor: diffusers' first codecs called their attention otherwise."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(
        r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda found: old[found[0]], name
    )


def _only(values: Mapping, name: str, fixed: Mapping, ours: type, free: set[str]) -> None:
    """Raises ValueError for a key that is neither ours, nor free, nor has its one value."""
    if values.get("_class_name", name) != name:
        raise ValueError(f"it is of a {values['_class_name']!r}; {name} is wanted")
    for key, value in values.items():
        if key in fixed:
            if value != fixed[key]:
                raise ValueError(f"{key} is {value!r}; only {fixed[key]!r} is known")
        elif key in ours.__dataclass_fields__ or key in free or key.startswith("_"):
            continue
        elif value is not None and value is not False:
            raise ValueError(f"{key} is {value!r}, which this network has not")


def _given(values: Mapping, ours: type, **defaults) -> dict:
    """What `values` says of our config's keys; diffusers' defaults where they are not ours."""
    known = {key: value for key, value in values.items() if key in ours.__dataclass_fields__}
    return defaults | known


# CompVis: one file, no config

COMPVIS_UNET, COMPVIS_VAE = "model.diffusion_model.", "first_stage_model."
COMPVIS_PREFIX = {"unet": COMPVIS_UNET, "vae": COMPVIS_VAE}
# the same networks in files of their own, without a prefix
COMPVIS_BARE = {
    "unet": r"(input_blocks|middle_block|output_blocks|time_embed|out)\..*",
    "vae": r"(encoder\.(conv_|down\.|mid\.|norm_)|decoder\.(conv_|up\.|mid\.|norm_)"
    r"|quant_conv\.|post_quant_conv\.).*",
}
COMPVIS_LOSS = r"first_stage_model\.loss\..*"  # what the codec was trained with


def compvis_part(tensors: Tensors, kind: str) -> dict[str, Any]:
    """The tensors of one network in a single file, under the names they have in a whole one."""
    prefix, bare = COMPVIS_PREFIX[kind], COMPVIS_BARE[kind]
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    alone = {n: tensor for n, tensor in tensors.items() if re.fullmatch(bare, n)}
    return found or {prefix + name: tensor for name, tensor in alone.items()}


def unet_from_compvis(tensors: Tensors) -> tuple[UNetConfig, Rules]:
    """Config and names of the UNet in a single file.

    Shapes do not say the number of heads: it is 8 in Stable Diffusion 1, with 1 x 1 convolutions
    around the attention, and width / 64 in 2, with linear layers. Raises ValueError for a missing
    tensor.
    """
    shape = _shapes(tensors, COMPVIS_UNET)
    downs = sorted(
        int(found[1])
        for name in tensors
        if (
            found := re.fullmatch(r"model\.diffusion_model\.input_blocks\.(\d+)\.0\.op\.bias", name)
        )
    )
    layers = (downs[0] if downs else sum(".0.in_layers.0.bias" in n for n in tensors)) - 1
    firsts = [1, *(1 + down for down in downs)]
    widths = tuple(shape(f"input_blocks.{i}.0.out_layers.3.bias")[0] for i in firsts)
    norms = [f"{COMPVIS_UNET}input_blocks.{i}.1.norm.bias" for i in firsts]
    linear = len(shape("middle_block.1.proj_in.weight")) == 2
    config = UNetConfig(
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.bias")[0],
        block_out_channels=widths,
        attention=tuple(name in tensors for name in norms),
        heads=tuple(max(1, width // 64) if linear else 8 for width in widths),
        layers_per_block=layers,
        cross_attention_dim=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        use_linear_projection=linear,
    )
    return config, compvis_unet_rules(config)


def compvis_unet_rules(config: UNetConfig) -> Rules:
    """Our UNet's names in CompVis' numbers: blocks are counted through all levels."""
    layers, last = config.layers_per_block, len(config.block_out_channels) - 1

    def number(blocks: str, part: str, offset: int = 0):
        def replace(found: re.Match) -> str:
            return f"{blocks}.{int(found[1]) * (layers + 1) + int(found[2]) + offset}.{part}"

        return replace

    def upsampler(found: re.Match) -> str:
        place = 2 if config.attention[last - int(found[1])] else 1  # behind an attention, if any
        return f"output_blocks.{int(found[1]) * (layers + 1) + layers}.{place}.conv"

    return (
        (r"(resnets\.\d+)\.norm1\.", r"\1.in_layers.0."),
        (r"(resnets\.\d+)\.conv1\.", r"\1.in_layers.2."),
        (r"(resnets\.\d+)\.time_emb_proj\.", r"\1.emb_layers.1."),
        (r"(resnets\.\d+)\.norm2\.", r"\1.out_layers.0."),
        (r"(resnets\.\d+)\.conv2\.", r"\1.out_layers.3."),
        (r"(resnets\.\d+)\.conv_shortcut\.", r"\1.skip_connection."),
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^mid_block\.resnets\.0", "middle_block.0"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.1", "middle_block.2"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)", number("input_blocks", "0", 1)),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)", number("input_blocks", "1", 1)),
        (r"^down_blocks\.(\d+)\.downsamplers\.(0)\.conv",
         number("input_blocks", "0.op", layers + 1)),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)", number("output_blocks", "0")),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)", number("output_blocks", "1")),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv", upsampler),
        (r"^", COMPVIS_UNET),
    )  # fmt: skip


def vae_from_compvis(tensors: Tensors) -> tuple[VAEConfig, Rules]:
    """Config and names of the codec in a single file; raises ValueError for a missing tensor."""
    shape = _shapes(tensors, COMPVIS_VAE)
    levels = _count(tensors, COMPVIS_VAE + "encoder.down.{}.block.0.norm1.bias")
    config = VAEConfig(
        in_channels=shape("encoder.conv_in.weight")[1],
        latent_channels=shape("post_quant_conv.bias")[0],
        block_out_channels=tuple(
            shape(f"encoder.down.{i}.block.0.conv1.bias")[0] for i in range(levels)
        ),
        layers_per_block=_count(tensors, COMPVIS_VAE + "encoder.down.0.block.{}.norm1.bias"),
    )
    return config, compvis_vae_rules(config)


def compvis_vae_rules(config: VAEConfig) -> Rules:
    """Our codec's names as CompVis': the decoder's levels are counted from the image's side."""
    last = len(config.block_out_channels) - 1
    return (
        (r"\bmid_block\.resnets\.0", "mid.block_1"),
        (r"\bmid_block\.attentions\.0", "mid.attn_1"),
        (r"\bmid_block\.resnets\.1", "mid.block_2"),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.down_blocks\.(\d+)\.", r".down.\1."),
        (r"\.up_blocks\.(\d+)\.", lambda found: f".up.{last - int(found[1])}."),
        (r"\.resnets\.", ".block."),
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"^", COMPVIS_VAE),
    )


def _shapes(tensors: Tensors, prefix: str):
    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in tensors:
            raise ValueError(f"the file lacks the tensor {prefix}{name}")
        return tensors[prefix + name].shape

    return shape


def _count(tensors: Tensors, pattern: str) -> int:
    """How many of the names "pattern", with 0, 1, ... in its braces, there are in a row."""
    return next(i for i in count() if pattern.format(i) not in tensors)
