"""Optimizers, schedules and groups: what a config names is what happens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from composer_jax.training.optimizer import make_optimizer, make_schedule
from tests.training import toy


def test_schedules_rise_hold_and_fall():
    def at(kind, *steps):
        schedule = make_schedule(2.0, 100, 10, 0.4, kind)
        return [float(schedule(step)) for step in steps]

    for kind in ("constant", "linear", "cosine", "rsqrt"):
        np.testing.assert_allclose(at(kind, 0, 5, 10, 40, 60), [0, 1, 2, 2, 2])
    np.testing.assert_allclose(at("constant", 99), [2])
    np.testing.assert_allclose(at("linear", 80, 100), [1, 0])
    np.testing.assert_allclose(at("cosine", 80, 100), [1, 0], atol=1e-7)
    np.testing.assert_allclose(at("rsqrt", 240), [1], rtol=1e-6)  # 60 / 240 steps: half
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        at("cosin", 1)


def update(optimizer, params, gradient):
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return jax.tree.map(np.asarray, updates)


def make(**options):
    known = {"weight_decay": 0.0, "clip": 1e9, "betas": (0.9, 0.99), "schedule": "constant"}
    return make_optimizer(0.1, 10, 0, 0.0, **known | options)


def test_a_group_learns_at_its_own_rate():
    params, gradient = toy.init(), jax.tree.map(lambda a: jnp.full_like(a, 0.3), toy.init())
    plain = update(make(), params, gradient)["layer"]
    groups = update(make(groups=(("bias", 0.5), (r"layer\.", 3.0))), params, gradient)["layer"]
    np.testing.assert_allclose(groups["bias"], 0.5 * plain["bias"])
    np.testing.assert_allclose(groups["kernel"], 3.0 * plain["kernel"])
    with pytest.raises(ValueError, match="'kernl' finds no parameter"):
        update(make(groups=(("kernl", 2.0),)), params, gradient)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    shapes = {"conv_in.kernel": (4, 8), "conv.kernel": (3, 3, 4, 8), "norm.scale": (8,)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    muon = update(make(name="muon"), params, params)
    adam = update(optax.adamw(0.1, 0.9, 0.99, weight_decay=0.0, nesterov=True), params, params)
    np.testing.assert_allclose(muon["norm.scale"], adam["norm.scale"], rtol=1e-5)
    np.testing.assert_allclose(muon["conv_in.kernel"], adam["conv_in.kernel"], rtol=1e-5)
    singular = np.linalg.svd(muon["conv.kernel"].reshape(36, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2.0  # five Newton-Schulz steps: about orthogonal
    assert np.sign(np.vdot(muon["conv.kernel"], params["conv.kernel"])) == -1
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        make(name="muo")


@pytest.mark.mesh
@pytest.mark.optimised  # bits
def test_muon_trains_and_resumes(tmp_path):
    whole = toy.fit(tmp_path / "whole", toy.settings(12), name="muon")
    toy.fit(tmp_path / "cut", toy.settings(6), name="muon")
    toy.same(whole, toy.fit(tmp_path / "cut", toy.settings(12), name="muon"))
    losses = [row["loss"] for row in toy.rows(tmp_path / "whole")]
    assert losses[-1] < losses[0]


def test_updates_are_those_of_optax():
    gradient = jax.tree.map(lambda a: jnp.full_like(a, 0.3), toy.init())
    ours = update(make(weight_decay=0.1), gradient, gradient)
    peer = update(optax.adamw(0.1, 0.9, 0.99, weight_decay=0.1), gradient, gradient)
    jax.tree.map(np.testing.assert_array_equal, ours, peer)


@pytest.mark.mesh
@pytest.mark.optimised  # bits
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_moves_parameters_as_one_in_float32(tmp_path, name):
    runs = {
        dtype: toy.fit(tmp_path / dtype, toy.settings(12), name=name, mu_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    for dtype, state in runs.items():
        kept = {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)}
        assert (dtype == "bfloat16") == ("bfloat16" in kept)
    start = toy.init()
    moves = (
        jax.tree.map(lambda p, s: np.asarray(p - s), state.params, start) for state in runs.values()
    )
    for exact, half in zip(*map(jax.tree.leaves, moves), strict=True):
        assert np.linalg.norm(half - exact) < 1e-2 * np.linalg.norm(exact)
    toy.fit(tmp_path / "cut", toy.settings(6), name=name, mu_dtype="bfloat16")
    resumed = toy.fit(tmp_path / "cut", toy.settings(12), name=name, mu_dtype="bfloat16")
    toy.same(runs["bfloat16"], resumed)
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        make(mu_dtype="bflot16")
