"""The composer of the built-in world: eight conditions, 64 px, rectified flow.

    composer train --config scenes64 --workdir runs/scenes64     34 minutes on 2 shared cores
    composer train --config scenes64:quick --workdir runs/quick  2 minutes on 2 cores

Not measured yet by `composer evaluate` and with the codec of six channels. With one of four, 4,000
steps reached, normalised between the unconditional model's raw score and the codec's: caption .73
(the model's CLIP), depth .96, intensity .88, mask .90, palette .67, semantics .80, sketch .72.

`:ablation` is what `configs/ablations/` vary.

`:smoke` is a run of seconds for tests.
"""

from ml_collections import ConfigDict

from composer_jax.models.unet import PRESETS
from composer_jax.training.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    config = defaults()
    config.task = "composer"
    config.source = "scenes:40000"
    config.image_size = 64
    config.codec = "bundled"
    config.clip = "bundled"
    config.clip_text = dict(skip=0, pad="")
    config.tools = dict(depth="", segmenter="", edges="")  # networks that conditions are taken by
    config.init_from = ""
    config.conditions = ()  # empty: all that the source can give
    config.steps = 9000
    config.batch = 32
    config.remat = "none"  # or "attention", "blocks": less memory, more arithmetic
    config.model = dict(
        unet=PRESETS["scenes64"].to_dict(),
        local_channels=32,
        stems="convolutions",  # or "resize": without parameters
        stem_width=48,
        vectors="both",  # or "timestep" or "tokens" alone
        tokens_per_vector=4,
        context_length=72,
    )
    config.process = dict(
        prediction="flow",
        schedule="flow",
        min_snr=None,
        density="logit-normal",  # of training times, or "uniform"
    )
    config.keep = 0.4  # a condition's chance in training; its own where None
    config.keep_maps = 0.15  # of one that is a map: one of five leaves the others little to say
    config.drop_all = 0.05
    config.keep_all = 0.1
    config.optimizer.update(
        learning_rate=1e-3, warmup=200, decay=0.4, weight_decay=0.0, clip=1.0, betas=(0.9, 0.99)
    )
    config.ema = 0.999
    config.sample_every = 4000
    config.sampler = dict(solver="dpmpp2m", steps=20, guidance=2.0)
    if variant == "quick":
        config.source = "scenes:2000"
        config.steps, config.log_every, config.save_every = 300, 10, 150
        config.sample_every = 0
        config.optimizer.warmup = 50
    elif variant == "ablation":
        config.source = "scenes:8000"
        config.steps, config.save_every, config.sample_every = 1500, 1500, 0
        config.held_out = "scenes:512"
    elif variant == "smoke":
        config.source = "scenes:64"
        config.steps, config.batch, config.log_every = 4, 8, 2
        config.model.unet = PRESETS["tiny"].to_dict()
        config.optimizer.warmup = 1
    elif variant:
        raise ValueError(
            f"scenes64 has no variant {variant!r}; there are quick, ablation and smoke"
        )
    return config
