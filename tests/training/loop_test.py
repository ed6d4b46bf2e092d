"""The loop: resumes bit for bit, runs on eight devices as on one, never trains on nonsense."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.training.loop import Interrupted, Settings, train
from composer_jax.training.sharding import AXES, make_mesh, shard_tree
from composer_jax.training.state import make_optimizer

TRUTH = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def init():
    return {"layer": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}}


def loss(params, batch, keys):
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
    found = batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"][None]
    error = jnp.mean((found - batch["y"] + noise) ** 2)
    return error, {"mae": jnp.sqrt(error)}


def batch(step):
    x = np.random.default_rng(step).normal(size=(16, 16)).astype(np.float32)
    return {"x": x, "y": x @ TRUTH}


def settings(steps, mesh=None, **changes):
    defaults = {"batch": 16, "seed": 0, "ema": 0.9, "log_every": 2, "save_every": 4}
    mesh = mesh or {"data": 8, "fsdp": 1, "tensor": 1}
    rules = (("kernel", "fsdp"),)
    return Settings(steps=steps, hook_every=0, mesh=mesh, sharding=rules, **defaults | changes)


def fit(workdir, run_settings, batch=batch):
    optimizer = make_optimizer(0.1, 20, 2, 0.5, 0.0, 1.0, (0.9, 0.99))
    return train(init, loss, optimizer, batch, run_settings, workdir)


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_it_learns_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole", settings(12))
    fit(tmp_path / "parts", settings(6))
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 7, "loss": 1}\n{"st')
    parts = fit(tmp_path / "parts", settings(12))
    same(whole, parts)
    drop = ("images_per_second",)
    clean = [
        [{k: v for k, v in row.items() if k not in drop} for row in rows(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert clean[0] == clean[1]
    assert clean[0][-1]["loss"] < clean[0][0]["loss"]


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_meshes_agree_and_parameters_are_split(tmp_path, mesh):
    one = fit(tmp_path / "one", settings(5))
    other = fit(tmp_path / "other", settings(5, dict(zip(AXES, mesh, strict=True))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.device_get(one.params),
        jax.device_get(other.params),
    )
    kernel = other.params["layer"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // mesh[1]


def test_signal_saves_and_the_run_goes_on(tmp_path):
    def interrupting(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(step)

    with pytest.raises(Interrupted) as stopped:
        fit(tmp_path / "cut", settings(12), interrupting)
    assert 5 <= stopped.value.step <= 7
    same(fit(tmp_path / "cut", settings(12)), fit(tmp_path / "whole", settings(12)))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    def poisoned(step):
        made = batch(step)
        return made | {"y": made["y"] * np.float32("nan")} if step == 6 else made

    with pytest.raises(FloatingPointError, match="at step 7"):
        fit(tmp_path, settings(12), poisoned)
    assert fit(tmp_path, settings(12)).step == 12
    assert np.all(np.isfinite([row["loss"] for row in rows(tmp_path)]))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    fit(tmp_path, settings(4))
    monkeypatch.setitem(globals(), "init", lambda: {"layer": {"kernel": jnp.zeros((16, 8))}})
    with pytest.raises(ValueError, match="another model"):
        fit(tmp_path, settings(8))


def test_mesh_and_tactics_are_checked():
    with pytest.raises(ValueError, match="8 devices"):
        make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="at most one is -1"):
        make_mesh(-1, -1, 1)
    with pytest.raises(ValueError, match="allowed: replicate, fsdp, tensor"):
        shard_tree(init(), make_mesh(), [("kernel", "fdsp")])
