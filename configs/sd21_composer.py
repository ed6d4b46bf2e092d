"""A composer around Stable Diffusion 2.1 (768 px model): eight conditions, v, warm start.

    composer train --config sd21_composer --workdir runs/sd21 --config.source=folder:IMAGES \\
        --config.tools.depth=depth-anything/Depth-Anything-V2-Small-hf

Its words are the last but one layer of OpenCLIP's ViT-H, padded with "!". Its heads are 64 wide,
which fits accelerators better than those of 1.5. All else is as in `sd15_composer`.

State: 11.5 GiB. What a step needs says `composer plan --config sd21_composer --topology ...`.
"""

from composer_jax.configs import sd15_composer
from ml_collections import ConfigDict

from composer_jax.models.unet import PRESETS


def get_config(variant: str = "") -> ConfigDict:
    config = sd15_composer.get_config(variant)
    config.process.prediction = "v"
    if variant == "smoke":
        config.model.unet.use_linear_projection = True
        return config
    config.image_size = 768
    config.init_from = config.codec = "stabilityai/stable-diffusion-2-1"
    config.clip = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    config.clip_text = dict(skip=1, pad="!")
    unet = PRESETS["sd21"].to_dict()
    config.model.unet = {**unet, "in_channels": unet["in_channels"] + sd15_composer.LOCAL}
    return config
