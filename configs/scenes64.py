"""The composer of the built-in world: eight conditions, 64 px, v on the flow schedule.

    composer train --config scenes64 --workdir runs/scenes64     95 minutes on 2 cores
    composer train --config scenes64:quick --workdir runs/quick  2 minutes on 2 cores

The bundled composer has 12.7 M parameters and seed 0, and is the last of four runs on 2 cores,
each going on from the one before (58, then 40 to 50 images/s). The first three predicted flow, with
`--config.process.prediction=flow --config.process.density=logit-normal`:

    composer train --config scenes64 --workdir runs/maps                          95 minutes
    composer train --config scenes64 --workdir runs/words --config.init_from=runs/maps \\
        --config.keep=0.5 --config.keep_maps=0.04 --config.drop_all=0.05 --config.keep_all=0.05 \\
        --config.optimizer.warmup=100 --config.optimizer.decay=0.3 --config.steps=1200   16 minutes
    composer train --config scenes64 --workdir runs/both --config.init_from=runs/words \\
        --config.clip_text.skip=2 --config.keep=0.45 --config.keep_maps=0.12 \\
        --config.drop_all=0.05 --config.optimizer.warmup=100 --config.optimizer.decay=0.5 \\
        --config.steps=4500                                                              60 minutes
    composer train --config scenes64 --workdir runs/v --config.init_from=runs/both \\
        --config.init_any_process=True --config.clip_text.skip=2 --config.keep=0.5 \\
        --config.keep_maps=0.15 --config.drop_all=0.05 --config.keep_all=0.07 \\
        --config.optimizer.warmup=100 --config.optimizer.decay=0.5 --config.steps=5800   72 minutes
    python benchmarks/bundle.py runs/v                                         into the package

Normalised control, one sample of each scene, 10 steps; alone and where all is given. After the
first run on 48 held-out scenes of seed 5, after the others on 64 of them:

    run  guidance  caption    depth      instances  intensity  palette    semantics  sketch
    1    2         .11  .95   .95  .99   .94  .98   .96  .94   .59  .74   .80  .92   .81  .93
    1    3         .21  .93   .98  .99   .95  .98   .95  .90   .53  .66   .83  .92   .84  .87
    3    2         .20  .92   .96  .97   .94  .97   .95  .94   .67  .75   .84  .92   .80  .90
    3    3         .24  .93   .98  .97   .96  .97   .94  .91   .56  .65   .86  .94   .83  .83
    4    2         .28  .92   .99  .98   .96  .97   .97  .95   .70  .76   .84  .92   .83  .91
    4    3         .29  .93  1.00  1.00  .97  .97   .96  .92   .59  .68   .84  .95   .85  .86

Why v: near t = 1 a network that predicts flow has to hand its input, the noise, through to its
output, and a narrow one fails: at t = .999 and given nothing, where one image should be guessed,
the guess still varied by .28 of x0's .98. v is -x0 there. After 500 steps of `:ablation`, squared
error of x0 on 128 held-out scenes at t = .999, given nothing / a caption / another's caption /
semantics / palette (x0's variance is .96):

    flow, logit-normal times    1.250  1.225  1.276  1.177  1.105
    v, the same, unweighted     1.101  1.061  1.111  1.002   .922
    v, even times               1.020   .967  1.058   .874   .779
    run 3, flow, 14,700 steps   1.076  1.016  1.089   .874   .737
    run 4, v, 5,800 more         .986   .906  1.036   .777   .676

At t = .5 the three small ones have .180, .216, .226: even times learn detail later. Captions alone
are obeyed in colour (.68, floor .12), size (.71, .53) and relation (.49, .28), hardly in shape and
count (.31, .30), which the noise decides.
In part the words are to blame: how many of each shape a caption names, a linear map finds in its
mean token with R2 .38 after the CLIP's last layer and .69 after its first, which
`clip_text.skip=2` takes. In the first run, with five maps kept by .3 each, one of them was there in
83 % of the examples and left the words little to say.
After 6 minutes, loss on held-out scenes: AdamW at batch 32 .572, Muon (3e-3, batch 64) .577.

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
    config.init_any_process = False  # init_from may have predicted something else
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
        prediction="v",  # or "flow": at t near 1 a narrow network fails to hand the noise through
        schedule="flow",
        min_snr=None,
        density="uniform",  # of training times, or "logit-normal"
        location=0.0,  # of "logit-normal"; above 0: more of what is nearly noise
    )
    config.keep = 0.3  # a condition's chance in training; its own where None
    config.keep_maps = 0.3  # of one that is a map; less leaves more to the other conditions
    config.drop_all = 0.1
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
        config.source, config.held_out = "scenes:8000", "scenes:512"
        config.steps, config.save_every, config.sample_every = 500, 500, 0
        config.conditions = ("caption", "depth", "palette", "semantics", "sketch")
        config.model.unet.update(block_out_channels=(80, 80), heads=(5, 5))
        config.model.stem_width = 32
        config.optimizer.warmup = 50
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
