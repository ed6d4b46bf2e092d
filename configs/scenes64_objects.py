"""The object detector of the built-in world: it reads instances and stated facts off samples.

    composer train --config scenes64_objects --workdir runs/objects       19 minutes on 2 cores

Reached with seed 2 on 1,024 held-out scenes (`python benchmarks/detectors.py`): instances' mean IoU
.898; of the facts that captions state, shape .967, colour .983, size .977, count .942, relation
.962. `assets/scenes64/objects` is this run's, in float16 (2.0 MB).

`:smoke` is a run of seconds for tests.
"""

from ml_collections import ConfigDict

from composer_jax.data.scenes import COLOURS, SHAPES, SIZES
from composer_jax.models.objects import ObjectConfig
from composer_jax.training.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    config = defaults()
    config.task = "objects"
    config.source = "scenes:20000"
    config.image_size = 64
    config.seed = 2
    config.steps = 4000
    config.batch = 32
    config.model = ConfigDict(ObjectConfig(SHAPES[1:], tuple(COLOURS), tuple(SIZES)).to_dict())
    config.optimizer.update(
        name="muon",
        learning_rate=2e-3,
        warmup=100,
        decay=0.6,
        weight_decay=1e-4,
        clip=1.0,
        betas=(0.9, 0.99),
    )
    config.ema = 0.998
    if variant == "smoke":
        config.source = "scenes:64"
        config.steps, config.batch, config.log_every = 4, 8, 2
        config.optimizer.warmup = 1
    elif variant:
        raise ValueError(f"scenes64_objects has no variant {variant!r}; there is smoke")
    return config
