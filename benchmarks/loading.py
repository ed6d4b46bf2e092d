"""Loading: cached examples a second, and what real data costs a train step.

    composer prepare scenes:4000 --out cache
    python benchmarks/loading.py --cache cache

The step is scenes64's at its own batch. Blocks of steps on one constant batch and on the cache's
stream take turns; the ratio is the median over pairs. The target is 1.03.
"""

import argparse
import os
import time
from functools import partial

os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import jax
import numpy as np

from composer_jax.data.extractors import absent_values, load_extractors
from composer_jax.data.stream import Caches
from composer_jax.training.composer import make_recipe
from composer_jax.training.config import load_config
from composer_jax.training.optimizer import make_optimizer
from composer_jax.training.state import abstract_state, start_state
from composer_jax.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True, help="of composer prepare")
    parser.add_argument("--config", default="scenes64:cpu")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    args = parser.parse_args()
    config = load_config(args.config)
    cache = Caches(f"cache:{args.cache}", size=config.image_size)

    read, rates = cache.batches(256, 0), []
    read(0)
    for block in range(5):
        start = time.perf_counter()
        for step in range(20):
            read(1 + 20 * block + step)
        rates.append(256 * 20 / (time.perf_counter() - start))
    print(f"cached examples/s: {np.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})")

    extractors = load_extractors(config)
    names = cache.conditions
    absent = absent_values(names, extractors.tools)
    recipe = make_recipe(config, names, extractors.clip.sizes, extractors.vae.config, absent)
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    shape = abstract_state(recipe.params, optimizer)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: place, shape)
    state = start_state(recipe.params, optimizer, (), shardings)
    step = partial(train_step, loss=recipe.loss, optimizer=optimizer, ema_decay=config.ema)
    read = cache.batches(config.batch, 0)
    constant, seed = jax.device_put(read(0)), np.uint32(0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, constant, seed).compile()

    def block(batch) -> float:
        nonlocal state
        start, coming = time.perf_counter(), batch(0)
        for done in range(args.steps):
            state, _ = compiled(state, coming, seed)
            coming = batch(done + 1)  # while the device works, as the training loop does
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / args.steps

    at = 0

    def streamed(_) -> dict:
        nonlocal at
        at += 1
        return jax.device_put(read(at))

    block(streamed)
    pairs = [(block(lambda _: constant), block(streamed)) for _ in range(args.pairs)]
    ratios = [real / same for same, real in pairs]
    same, real = np.median(pairs, axis=0)
    print(f"step, ms: constant batch {1e3 * same:.0f}, from the cache {1e3 * real:.0f}; "
          f"ratio {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
