"""A composer around Stable Diffusion 1.5: eight conditions, 512 px, eps, warm start.

    composer train --config sd15_composer --workdir runs/sd15 --config.source=folder:IMAGES \\
        --config.tools.depth=depth-anything/Depth-Anything-V2-Small-hf

`init_from` gives UNet and codec; `clip` is named apart, because the directories of Stable
Diffusion hold a text encoder alone. At step 0 the composer with only a caption is Stable Diffusion.
What trains is a pattern on the names of parameters:

    --config.trainable=                                       all: 11.4 GiB of state
    --config.trainable='^(?!unet\\.)|^unet\\.conv_in'          the new ones alone: 6.6 GiB
    --config.trainable='^(?!unet\\.)|^unet\\.conv_in|attn2'    and cross-attention: 6.8 GiB

State is parameters, average and optimizer, float32 (the first moment bfloat16), split over the
mesh's fsdp axis. Beside it a step needs memory for its batch: the compiler, ahead of time for TPU
v5p, 2 x 2 x 1 chips with fsdp 4 and 4 images a chip, bfloat16, all training, asks for 4.5 GiB a
device beside 2.9 of state, and estimates 55 ms (`composer plan --config sd15_composer --topology
v5p:2x2x1 --batch 16` says it anew, in a quarter of an hour on 2 cores).

`:smoke` is a run of seconds for tests, around any small UNet that `init_from` names.
"""

from ml_collections import ConfigDict

from composer_jax import conditions
from composer_jax.models.unet import PRESETS
from composer_jax.training.config import defaults

LOCAL = 16  # channels that local conditions add to the UNet's input


def get_config(variant: str = "") -> ConfigDict:
    unet = PRESETS["sd15"].to_dict()
    config = defaults()
    config.task = "composer"
    config.source = "folder:images"
    config.image_size = 512
    config.init_from = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.init_any_process = False  # init_from may have predicted something else
    config.codec = config.init_from
    config.clip = "openai/clip-vit-large-patch14"
    config.clip_text = dict(skip=0, pad="")
    config.tools = dict(depth="", segmenter="", edges="")
    config.conditions = ()
    config.steps = 100_000
    config.batch = 64
    config.dtype = "bfloat16"
    config.remat = "none"  # or "attention", "blocks": less memory, more arithmetic
    config.model = dict(
        unet={**unet, "in_channels": unet["in_channels"] + LOCAL},
        local_channels=LOCAL,
        stems="convolutions",  # or "resize": without parameters
        stem_width=128,
        vectors="both",  # or "timestep" or "tokens" alone
        tokens_per_vector=4,
        context_length=128,
    )
    config.process = dict(prediction="eps", schedule="sd", zero_terminal_snr=False, min_snr=None)
    config.keep = None  # a condition's chance in training; its own where None
    config.keep_maps = None  # of one that is a map, where it differs
    config.keep_each = dict.fromkeys(conditions.names())  # by name, where one differs
    config.drop_all = 0.1
    config.keep_all = 0.1
    config.optimizer.update(
        learning_rate=5e-5,
        warmup=1000,
        decay=0.1,
        weight_decay=0.01,
        clip=1.0,
        betas=(0.9, 0.999),
        mu_dtype="bfloat16",
    )
    config.ema = 0.9999
    config.mesh = dict(data=1, fsdp=-1, tensor=1)
    config.log_every = 50
    config.save_every = 2000
    config.sample_every = 10_000
    config.sampler = dict(solver="dpmpp2m", steps=30, guidance=3.0)
    if variant == "smoke":
        config.source, config.image_size = "scenes:64", 64
        config.codec = config.clip = "bundled"
        config.init_from = ""
        config.steps, config.batch, config.log_every, config.sample_every = 2, 8, 1, 0
        config.dtype = "float32"
        config.mesh = dict(data=-1, fsdp=1, tensor=1)
        config.optimizer.warmup = 1
        config.model.update(stem_width=16, context_length=72)
        config.model.unet.update(
            in_channels=6 + LOCAL,  # the bundled codec's
            out_channels=6,
            block_out_channels=(16, 32),
            attention=(True, False),
            heads=(2, 2),
            layers_per_block=1,
            cross_attention_dim=128,
            norm_num_groups=4,
        )
    elif variant:
        raise ValueError(f"there is no variant {variant!r}; there is smoke")
    return config
