"""The smallest thing that the loop trains; as a script, a process that tests start and kill.

python toy.py WORKDIR STEPS [KEY=VALUE of Settings ...]
"""

import json
import logging
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.training.cluster import gather, is_main, join, share
from composer_jax.training.loop import Settings, train
from composer_jax.training.optimizer import make_optimizer
from composer_jax.training.sharding import make_mesh

TRUTH = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
BALLAST = "TOY_BALLAST"  # in the environment
MESH = {"data": -1, "fsdp": 1, "tensor": 1}


def init():
    params = {"layer": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}}
    if BALLAST in os.environ:  # no gradient, but enough for every process to write files of its own
        params["ballast"] = {"kernel": jax.random.normal(jax.random.key(0), (256, 128))}
    return params


def loss(params, batch, keys):
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
    found = batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"][None]
    error = jnp.mean((found - batch["y"] + noise) ** 2, axis=-1)
    return error, {"mae": jnp.sqrt(error)}


def batch(step, part=(0, 1)):
    x = np.random.default_rng(step).normal(size=(16, 16)).astype(np.float32)
    rows = slice(part[0] * 16 // part[1], (part[0] + 1) * 16 // part[1])
    return {"x": x[rows], "y": (x @ TRUTH)[rows]}


def settings(steps, **changes):
    defaults = {"batch": 16, "seed": 0, "ema": 0.9, "log_every": 2, "save_every": 4}
    defaults |= {"mesh": MESH, "sharding": (("kernel", "fsdp"),)}
    return Settings(steps=steps, **defaults | changes)


def optimizer(**options):
    known = {"weight_decay": 0.0, "clip": 1.0, "betas": (0.9, 0.99)}
    return make_optimizer(0.1, 20, 2, 0.5, **known | options)


def fit(workdir, run_settings, batch=batch, hooks=(), **options):
    return train(init(), loss, optimizer(**options), batch, run_settings, workdir, hooks)


def rows(workdir):
    """metrics.jsonl without what the clock says."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, gather(a), gather(b))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    join()
    workdir, steps = Path(sys.argv[1]), int(sys.argv[2])
    chosen = {key: json.loads(value) for key, value in (w.split("=") for w in sys.argv[3:])}
    chosen = settings(steps, **chosen)
    part = share(make_mesh(**chosen.mesh), chosen.batch)
    state = gather(fit(workdir, chosen, lambda step: batch(step, part)))
    if is_main():
        leaves, _ = jax.tree.flatten(state)
        np.savez(workdir / "state.npz", *leaves)
