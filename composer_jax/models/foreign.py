"""What files and folders of other models are, so that a message can name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from composer_jax.models.files import PICKLES

# of single files: a pattern of tensors' names, and what has them; the first match counts
FILES = (
    (r"scaled_fp8|.*\.(scale_weight|weight_scale)", "scaled float8 weights, as ComfyUI uses them"),
    (r"(lora|lycoris)_.*|.*\.(lora|lora_[A-Za-z]+|hada_w1_a|lokr_w1)(\..*)?",
     "a LoRA, which changes another model's weights"),
    (r"(model\.diffusion_model\.|model\.)?(joint_blocks|double_blocks|single_blocks)\..*",
     "a transformer (Stable Diffusion 3, Flux)"),
    (r"(model\.diffusion_model\.)?label_emb\..*|conditioner\.embedders\..*", "Stable Diffusion XL"),
    (r"(control_model\.)?(zero_convs|input_hint_block|controlnet_\w+)\..*", "a ControlNet"),
    (r"emb_params|string_to_param.*|<.*>", "an embedding of textual inversion"),
    (r"(cond_stage_model|text_model|vision_model|transformer\.resblocks)\..*", "a text encoder"),
    (r"(down|mid|up)_blocks?\..*|(encoder|decoder)\.(down|mid|up)_blocks?\..*",
     "a file of diffusers, which its config.json belongs to: give the folder with both"),
)  # fmt: skip
# further input channels of published UNets, beside the latent's four
INPUTS = {
    9: "an inpainting UNet (latent, mask, latent of the masked image)",
    8: "a UNet of InstructPix2Pix's kind (latent, latent of the image)",
    7: "an upscaler's UNet (latent, small image)",
    5: "a depth-to-image UNet (latent, depth)",
}
# what of a single file or a pipeline is no UNet and no codec
PARTS = {
    "model_ema": "the moving average",
    "cond_stage_model": "the text encoder",
    "conditioner": "the text encoders",
    "text_encoder": "the text encoder",
    "tokenizer": "the tokenizer",
    "safety_checker": "the safety checker",
    "feature_extractor": "its preprocessing",
    "image_encoder": "the image encoder",
}


def of_file(names: Iterable[str]) -> str:
    """What a file with tensors of these names is, "" where that is not known."""
    names = list(names)
    for pattern, what in FILES:
        if any(re.fullmatch(pattern, name) for name in names):
            return what
    return ""


def of_pipeline(entries: Mapping[str, Any], folder: Path) -> str:
    """What a folder of diffusers holds in place of a UNet, by its model_index.json."""
    whose = entries.get("_class_name")
    if "transformer" in entries or (folder / "transformer").is_dir():
        return f"{whose or 'it'} has a transformer, which is not read"
    if "prior" in entries or "decoder" in entries:
        return f"{whose} is not read"
    return ""


def of_folder(folder: Path, config: Mapping[str, Any]) -> str:
    """What a folder without a network that is read holds; `config`: its config.json, if any."""
    if kind := config.get("_class_name") or config.get("model_type"):
        return f"its config.json is of a {kind!r}"
    for part in ("unet", "vae"):
        if (folder / part).is_dir() and not (folder / part / "config.json").is_file():
            return f"its {part} lacks config.json"
    names = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", *PICKLES)]
    return f"it has {', '.join(names[:3])}: give the file itself" if names else ""


def refuse_inputs(in_channels: int, out_channels: int) -> None:
    """Raises ValueError for a UNet that takes more than the noisy latent."""
    if in_channels != out_channels:
        what = INPUTS.get(in_channels, "a UNet with further inputs")
        raise ValueError(
            f"{what}: it takes {in_channels} channels and gives {out_channels}; only UNets that "
            "take the latent alone, of text-to-image models, are read"
        )
