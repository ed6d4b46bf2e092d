"""The codec of the built-in world: f4, 6 channels, 64 px.

    composer train --config scenes64_codec --workdir runs/codec           37 minutes on 2 cores

Reached with seed 0 on 256 held-out scenes (`python benchmarks/codec.py`): PSNR 40.3 dB (mean over
images; 39.2 dB of the mean squared error), F1@1px of their sketches .976. `assets/scenes64/vae` is
this run's, in float16, which costs neither.

Tried in 1,000 steps of batch 16, 5 minutes each, PSNR and F1: AdamW at 1e-3 35.2 dB, .946; Muon at
1e-3 36.0, .952; Muon at 3e-3 36.5, .954; with edges weighed 1 instead of 0.25 36.2, .949; with the
absolute error ("l1", edges 0.5) 35.9, .956; and with 6 channels instead of 4 37.4, .965. With 4
channels and the squared error 8,000 steps ended at 39.1 dB, .964: what is missed there are faint
edges, which the absolute error cares for.

`:smoke` is a run of seconds for tests.
"""

from ml_collections import ConfigDict

from composer_jax.models.vae import PRESETS
from composer_jax.training.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    config = defaults()
    config.task = "codec"
    config.source = "scenes:16000"
    config.image_size = 64
    config.steps = 8000
    config.batch = 16
    config.model = ConfigDict(PRESETS["scenes64"].to_dict())
    config.norm = "l1"  # of errors, or "l2"
    config.kl_weight = 2e-4
    config.edge_weight = 0.5
    config.optimizer.update(
        name="muon",
        learning_rate=3e-3,
        warmup=100,
        decay=0.6,
        weight_decay=0.0,
        clip=1.0,
        betas=(0.9, 0.99),
    )
    config.ema = 0.998
    config.sample_every = 1000
    if variant == "smoke":
        config.source = "scenes:64"
        config.steps, config.batch, config.log_every = 4, 8, 2
        config.model.block_out_channels = (16,)
        config.optimizer.warmup = 1
    elif variant:
        raise ValueError(f"scenes64_codec has no variant {variant!r}; there is smoke")
    return config
