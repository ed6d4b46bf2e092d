"""The loop: resumes bit for bit, runs on any mesh as on one device, never trains on nonsense."""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.training.loop import Interrupted, train
from composer_jax.training.sharding import AXES, make_mesh, shard_tree
from tests.training import toy
from tests.training.toy import fit, rows, same, settings

pytestmark = [pytest.mark.mesh, pytest.mark.optimised]  # meshes, and bits

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]


def mesh(*sizes):
    return dict(zip(AXES, sizes, strict=True))


def close(a, b, rtol=1e-5):
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for key in a[0]:
        np.testing.assert_allclose([r[key] for r in a], [r[key] for r in b], rtol=rtol)


def test_it_learns_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole", settings(12, lengths=(0.05, 0.1)))
    fit(tmp_path / "parts", settings(6, lengths=(0.05, 0.1)))
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 7, "loss": 1}\n{"st')
    same(whole, fit(tmp_path / "parts", settings(12, lengths=(0.05, 0.1))))
    clean = [rows(tmp_path / name) for name in ("whole", "parts")]
    assert clean[0] == clean[1]
    assert clean[0][-1]["loss"] < clean[0][0]["loss"]


@pytest.mark.parametrize("sizes", MESHES)
def test_state_is_split_and_goes_on_over_another_mesh(tmp_path, sizes):
    options = {"lengths": (0.1,), "log_every": 1}
    one = fit(tmp_path / "one", settings(10, **options))
    fit(tmp_path / "other", settings(5, mesh=mesh(8, 1, 1), **options))
    other = fit(tmp_path / "other", settings(10, mesh=mesh(*sizes), **options))
    close(rows(tmp_path / "one"), rows(tmp_path / "other"))
    moments = jax.tree.leaves(one.opt_state)
    assert len(moments) > 4
    for tree in (other.params, other.ema, other.averages, other.opt_state):
        for leaf in jax.tree.leaves(tree):
            share = leaf.nbytes // (sizes[1] if leaf.shape == (16, 8) else 1)
            assert {s.data.nbytes for s in leaf.addressable_shards} == {share}


def test_a_batch_in_parts_is_the_whole_batch(tmp_path):
    whole = fit(tmp_path / "whole", settings(5, mesh=mesh(2, 2, 2), log_every=1))
    for parts in (2, 4):
        found = fit(
            tmp_path / str(parts), settings(5, mesh=mesh(2, 2, 2), log_every=1, accumulate=parts)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), whole, found
        )
        losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", str(parts))]
        np.testing.assert_allclose(*losses, rtol=1e-6)
    with pytest.raises(ValueError, match="must divide the batch of 16"):
        settings(5, accumulate=3)


def test_signal_saves_and_the_run_goes_on(tmp_path):
    def interrupting(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.batch(step)

    with pytest.raises(Interrupted) as stopped:
        fit(tmp_path / "cut", settings(12, log_every=5), interrupting)
    assert 5 <= stopped.value.step <= 7
    again = fit(tmp_path / "cut", settings(12, log_every=5))
    same(again, fit(tmp_path / "whole", settings(12, log_every=5)))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_keeps_the_checkpoint_and_the_batch(tmp_path):
    def poisoned(step):
        made = toy.batch(step)
        return made | {"y": made["y"] * np.float32("nan")} if step == 6 else made

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 7; .*nonfinite-7-0\.npz"):
        fit(tmp_path, settings(12), poisoned)
    with np.load(tmp_path / "nonfinite-7-0.npz") as kept:
        np.testing.assert_array_equal(kept["x"], toy.batch(6)["x"])
        assert np.isnan(kept["y"]).all()
    assert fit(tmp_path, settings(12)).step == 12
    assert np.all(np.isfinite([row["loss"] for row in rows(tmp_path)]))


def test_hooks_have_one_signature_and_their_scalars_are_logged(tmp_path):
    seen = []

    def counts(step, state):
        seen.append(step)
        return {"counted": float(state.step)}

    fit(tmp_path, settings(7), hooks=[(3, counts), (100, lambda step, state: None)])
    assert seen == [3, 6, 7]
    counted = [row for row in rows(tmp_path) if "counted" in row]
    assert counted == [{"step": step, "counted": float(step)} for step in seen]


def test_a_run_killed_between_its_last_checkpoint_and_the_export_exports(tmp_path):
    saved = []
    parts = toy.init(), toy.loss, toy.optimizer(), toy.batch, settings(4), tmp_path
    for _ in range(2):
        train(*parts, on_save=lambda step, state: saved.append((step, int(state.step))))
    assert saved == [(4, 4), (4, 4)]


def test_a_run_is_not_taken_back_to_fewer_steps(tmp_path):
    fit(tmp_path, settings(4))
    with pytest.raises(ValueError, match=r"steps is 2, and .* has been trained for 4 steps"):
        fit(tmp_path, settings(2))


def test_the_time_of_hooks_is_not_that_of_steps(tmp_path):
    fit(tmp_path, settings(12, save_every=100), hooks=[(3, lambda step, state: time.sleep(1))])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = [line["images_per_second"] for line in lines]
    assert len(rates) == 6 and min(rates[1:]) > 64  # 32 images, or 31 a second and less


def test_a_profile_of_some_steps_is_for_tensorboard(tmp_path):
    fit(tmp_path, settings(6, profile=(2, 4)))
    assert list((tmp_path / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))
    with pytest.raises(ValueError, match="a first and a later last step"):
        settings(6, profile=(4, 2))


def test_a_profile_that_libtpu_without_a_tpu_would_crash_is_refused(tmp_path, monkeypatch):
    (tmp_path / "libtpu.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Set JAX_PLATFORMS=cpu"):
        fit(tmp_path, settings(6, profile=(2, 4)))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    fit(tmp_path, settings(4))
    monkeypatch.setattr(toy, "init", lambda: {"layer": {"kernel": jnp.zeros((16, 8))}})
    with pytest.raises(ValueError, match="another model"):
        fit(tmp_path, settings(8))


def test_mesh_and_tactics_are_checked():
    with pytest.raises(ValueError, match="is for 3 devices; there are 8"):
        make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="at most one is -1"):
        make_mesh(-1, -1, 1)
    with pytest.raises(ValueError, match="allowed: replicate, fsdp, tensor"):
        shard_tree(toy.init(), make_mesh(), [("kernel", "fdsp")])


def test_every_line_of_the_log_says_what_a_step_did(tmp_path):
    fit(tmp_path, settings(4))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        known = {"step", "loss", "mae", "grad_norm", "update_norm", "images_per_second"}
        assert set(json.loads(line)) == known
