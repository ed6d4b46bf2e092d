"""Depth networks on disk: Depth Anything and DPT as transformers saves them, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from composer_jax.models.blocks import default_dtype
from composer_jax.models.depth import Preprocess, check_type
from composer_jax.models.dpt import DPT, DPTConfig
from composer_jax.models.files import (
    FORMAT,
    PICKLES,
    Tensor,
    compare,
    fill_module,
    member,
    module_tensors,
    open_tensors,
    read_json,
)
from composer_jax.models.hub import find_folder
from composer_jax.models.initializers import abstract
from composer_jax.models.peers import Rules, from_peer
from composer_jax.models.weight_files import choose_weights, find_weights, lacking_weights

KIND = "dpt"
WHAT = "depth network"
_NECK = (
    (r"^reassemble\.(\d+)\.readout", r"neck.reassemble_stage.readout_projects.\1.0"),
    (r"^reassemble", "neck.reassemble_stage.layers"),
    (r"^convs", "neck.convs"),
    (r"^fusion", "neck.fusion_stage.layers"),
)
_BACKBONE = (
    (r"^backbone\.(cls_token|position_embeddings)", r"backbone.embeddings.\1"),
    (r"^backbone\.projection", "backbone.embeddings.patch_embeddings.projection"),
    (r"^backbone\.layers", "backbone.encoder.layer"),
    (r"self_attn\.q_proj", "attention.attention.query"),
    (r"self_attn\.k_proj", "attention.attention.key"),
    (r"self_attn\.v_proj", "attention.attention.value"),
    (r"self_attn\.out_proj", "attention.output.dense"),
)
RULES: Mapping[str, Rules] = {  # our names to transformers', by family
    "depth_anything": (
        *_NECK,
        *_BACKBONE,
        (r"layer_norm([12])", r"norm\1"),
        (r"(layer_scale[12])$", r"\1.lambda1"),
    ),
    "dpt": (
        *_NECK,
        *_BACKBONE,
        (r"^backbone", "dpt"),
        (r"layer_norm1", "layernorm_before"),
        (r"layer_norm2", "layernorm_after"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"^head\.conv1", "head.head.0"),
        (r"^head\.conv2", "head.head.2"),
        (r"^head\.conv3", "head.head.4"),
    ),
}
# what depth does not need: what DINOv2 was trained with, the norm after a backbone whose maps take
# none, what the first fusion would do to a map that it does not have
UNUSED = (
    r"backbone\.embeddings\.mask_token|(dpt|backbone)\.layernorm\..*|dpt\.pooler\..*"
    r"|neck\.fusion_stage\.layers\.0\.residual_layer1\..*"
)


def load_dpt(source: str | Path, dtype=None) -> DPT:
    """A depth network from a directory or a hub name, as `open_dpt` takes it.

    `dtype`: what it computes in, by default bfloat16 on accelerators, float32 on CPU. Raises
    ValueError, one line, where something is missing, surplus, mis-shaped or not supported.
    """
    config, tensors = open_dpt(source)
    network = _abstract(config, dtype or default_dtype())
    fill_module(network, tensors, str(source))
    return network


def open_dpt(source: str | Path) -> tuple[DPTConfig, dict[str, Tensor]]:
    """The shape of a depth network and its tensors under our names; no tensor is read yet.

    `source`: a directory or a hub name of Depth Anything (V1, V2, metric) or DPT as transformers
    saves them, or a directory of ours: config.json with "kind": "dpt" and `DPTConfig.to_dict`,
    and model.safetensors under our names. Raises ValueError, one line, for anything else.
    """
    folder = find_folder(source, WHAT, _choose, _missing)
    values = read_json(member(folder, "config.json"))
    try:
        config = read_config(values, _read_processor(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    path = find_weights(folder, "model")
    tensors, wanted = open_tensors(path, folder), module_tensors(_abstract(config))
    if values.get("kind") == KIND:
        compare({name: tensor.shape for name, tensor in wanted.items()}, tensors, str(path))
        return config, tensors
    return config, from_peer(wanted, tensors, str(path), RULES[config.family], UNUSED)


def is_dpt(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a depth network which `open_dpt` may read."""
    return values.get("kind") == KIND or str(values.get("model_type")) in RULES


def read_config(values: Mapping[str, Any], processor: Mapping[str, Any] | None) -> DPTConfig:
    """A network's shape from config.json's values, transformers' or ours.

    `processor`: the values of transformers' preprocessor_config.json, or None where there is none.
    Raises ValueError naming the key that is not supported or of a wrong type.
    """
    if values.get("kind") == KIND:
        if values.get("format") != FORMAT:
            raise ValueError(f"format is {values.get('format')!r}; this version reads {FORMAT}")
        return DPTConfig.from_dict({k: v for k, v in values.items() if k not in ("format", "kind")})
    readers = {"depth_anything": _depth_anything, "dpt": _dpt}
    family = values.get("model_type")
    if not isinstance(family, str) or family not in readers:
        raise ValueError(f"model_type is {family!r}; allowed: {', '.join(readers)}")
    return DPTConfig(family=family, **readers[family](_Keys(values), processor))


class _Keys:
    """A peer's JSON object: values by key, of a given type; what it leaves out is the default."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self.values, self.where = values, where

    def get(self, key: str, default, zero: bool = False):
        """The value, of the default's type; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        check_type(self.where + key, value, default, zero)
        return tuple(value) if isinstance(value, list) else value

    def only(self, key: str, *allowed):
        """The value where it is an allowed one; the first is the default, and what null means."""
        value = self.values.get(key)
        value = allowed[0] if value is None else value
        if value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{self.where}{key} is {value!r}; allowed: {listed}")
        return value


def _depth_anything(keys: _Keys, processor) -> dict[str, Any]:
    if not isinstance(keys.values.get("backbone_config"), Mapping):
        raise ValueError("backbone_config is missing; that of a dinov2 is wanted")
    backbone = _Keys(keys.values["backbone_config"], "backbone_config.")
    if backbone.values.get("model_type") != "dinov2":
        raise ValueError(
            f"backbone_config.model_type is {backbone.values.get('model_type')!r}; allowed: dinov2"
        )
    backbone.only("use_swiglu_ffn", False)
    vit = _vit(backbone, patch=14, image=224, eps=1e-6)
    width = vit["width"]
    layers = backbone.get("num_hidden_layers", 12)
    names = tuple(f"stage{tap}" for tap in backbone.get("out_indices", (layers,)))
    names = backbone.get("out_features", names)
    stages = {f"stage{number}": number for number in range(1, min(layers, 2**10) + 1)}
    for name in names:
        if name not in stages:
            raise ValueError(
                f"backbone_config.out_features has {name!r}; allowed: stage1 to stage{layers}"
            )
    keys.only("patch_size", vit["patch"])
    keys.only("reassemble_hidden_size", width)
    return {
        **vit,
        **_neck(keys, names, (48, 96, 192, 384), 64),
        "hidden": int(width * backbone.get("mlp_ratio", 4.0)),
        "taps": _last_is(tuple(stages[name] for name in names), layers, "out_features"),
        "normed_taps": backbone.get("apply_layernorm", True),
        "head_width": keys.get("head_hidden_size", 32),
        "output": keys.only("depth_estimation_type", "relative", "metric"),
        "max_depth": keys.get("max_depth", 1.0, zero=True) or 1.0,
        "preprocess": Preprocess() if processor is None else _preprocess(processor),
    }


def _dpt(keys: _Keys, processor) -> dict[str, Any]:
    keys.only("is_hybrid", False)
    keys.only("backbone_config", None)
    keys.only("backbone", None)
    keys.only("use_batch_norm_in_fusion_residual", False)
    keys.only("use_bias_in_fusion_residual", True)
    keys.only("add_projection", False)
    layers = keys.get("num_hidden_layers", 12)
    taps = tuple(i + 1 for i in keys.get("backbone_out_indices", (2, 5, 8, 11), zero=True))
    return {
        **_vit(keys, patch=16, image=384, eps=1e-12),
        **_neck(keys, taps, (96, 192, 384, 768), 256),
        "hidden": keys.get("intermediate_size", 3072),
        "taps": _last_is(taps, layers, "backbone_out_indices"),
        "normed_taps": False,
        "readout": keys.only("readout_type", "project", "add", "ignore"),
        "head_width": 32,
        "preprocess": _preprocess(processor or {}),
    }


def _vit(keys: _Keys, patch: int, image: int, eps: float) -> dict[str, Any]:
    keys.only("qkv_bias", True)
    keys.only("num_channels", 3)
    keys.only("hidden_act", "gelu")
    patch = keys.get("patch_size", patch)
    return {
        "patch": patch,
        "grid": keys.get("image_size", image) // patch,
        "width": keys.get("hidden_size", 768),
        "heads": keys.get("num_attention_heads", 12),
        "eps": keys.get("layer_norm_eps", eps),
    }


def _neck(keys: _Keys, taps: tuple, widths: tuple[int, ...], fusion: int) -> dict[str, Any]:
    keys.only("head_in_index", -1, len(taps) - 1)
    return {
        "factors": tuple(map(float, keys.get("reassemble_factors", (4.0, 2.0, 1.0, 0.5)))),
        "neck_widths": keys.get("neck_hidden_sizes", widths),
        "fusion_width": keys.get("fusion_hidden_size", fusion),
    }


def _last_is(taps: tuple[int, ...], layers: int, key: str) -> tuple[int, ...]:
    if taps[-1] != layers:
        raise ValueError(f"{key} ends with layer {taps[-1]}; allowed: num_hidden_layers, {layers}")
    return taps


def _preprocess(values: Mapping[str, Any]) -> Preprocess:
    keys = _Keys(values, "preprocessor_config.json: ")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        keys.only(key, True)
    keys.only("do_pad", False)
    size = keys.values.get("size") or 384
    size = size if isinstance(size, Mapping) else {"height": size, "width": size}
    sides = _Keys(size, f"{keys.where}size.")
    missing = [side for side in ("height", "width") if side not in size]
    if missing:
        raise ValueError(f"{keys.where}size has no {missing[0]}")
    return Preprocess(
        size=(sides.get("height", 1), sides.get("width", 1)),
        keep_aspect_ratio=keys.get("keep_aspect_ratio", False),
        multiple=keys.get("ensure_multiple_of", 1),
        resample=keys.only("resample", 3, 0, 1, 2, 4, 5),
        rescale=keys.get("rescale_factor", 1 / 255),
        mean=keys.get("image_mean", (0.5,) * 3, zero=True),
        std=keys.get("image_std", (0.5,) * 3),
    )


def _read_processor(folder: Path) -> dict[str, Any] | None:
    path = member(folder, "preprocessor_config.json")
    return read_json(path) if path.is_file() else None


def _abstract(config: DPTConfig, dtype=jnp.float32) -> DPT:
    return abstract(DPT, config, dtype=dtype)


def _missing(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "config.json"
    if any(path.suffix in PICKLES for path in folder.iterdir()):
        return ""  # `find_weights` says what is wrong
    return lacking_weights(folder, "model")


def _choose(files: set[str]) -> list[str]:
    weights = choose_weights(files, "model")
    if "config.json" not in files or not weights:
        return []
    return ["config.json", *({"preprocessor_config.json"} & files), *weights]
