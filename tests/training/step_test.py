"""One step against its formulas, written down again in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from composer_jax.training.ema import gamma_of
from composer_jax.training.state import TrainState
from composer_jax.training.step import example_keys, in_parts, only, train_step

pytestmark = pytest.mark.fast

BATCH, RATE, LENGTH = 4, 0.1, 0.1
PARAMS = {"a": np.array([0.5, -1.0, 2.0], np.float32), "b": {"kernel": np.float32([[1.0, 3.0]])}}


def numbers(keys):
    return jax.vmap(jax.random.normal)(keys)


def loss(params, batch, keys):
    """Each example has its input, and noise of its own key."""
    noise_B = numbers(keys)
    out_B = batch["x"] @ params["a"] + batch["y"] * params["b"]["kernel"].sum() + noise_B
    return out_B**2, {"noise": noise_B}


def batch():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(BATCH, 3)).astype(np.float32),
        "y": rng.normal(size=BATCH).astype(np.float32),
    }


def begun(step):
    """A state whose averages are other numbers than its parameters."""
    ema, average = (jax.tree.map(lambda p, by=by: by * p, PARAMS) for by in (2.0, -3.0))
    opt_state = optax.sgd(RATE).init(PARAMS)
    return TrainState(PARAMS, ema, {f"{LENGTH:g}": average}, opt_state, jnp.int32(step))


def stepped(step=0, seed=3, **options):
    settings = {"loss": loss, "optimizer": optax.sgd(RATE), "ema_decay": 0.9} | options
    return train_step(begun(step), batch(), jnp.uint32(seed), **settings)


def wanted_of(step, seed=3):
    """Loss, mean of the noise and gradient, by numpy."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    noise = np.array([jax.random.normal(jax.random.fold_in(key, i)) for i in range(BATCH)])
    x, y = batch()["x"], batch()["y"]
    out = x @ PARAMS["a"] + y * PARAMS["b"]["kernel"].sum() + noise
    of_kernel = np.full((1, 2), np.mean(2 * out * y))
    gradient = {"a": np.mean(2 * out[:, None] * x, axis=0), "b": {"kernel": of_kernel}}
    return np.mean(out**2), noise.mean(), gradient


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def norm(tree):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("step", [0, 5, 1000])
def test_a_step_is_gradient_optimizer_and_averages(step):
    state, metrics = stepped(step)
    value, noise, gradient = wanted_of(step)
    close(metrics["loss"], value)
    close(metrics["noise"], noise)
    close([metrics["grad_norm"], metrics["update_norm"]], [norm(gradient), RATE * norm(gradient)])
    params = jax.tree.map(lambda p, g: p - RATE * g, PARAMS, gradient)
    close(state.params, params)
    decay = min(0.9, (1 + step) / (10 + step))
    close(state.ema, jax.tree.map(lambda p, n: decay * 2 * p + (1 - decay) * n, PARAMS, params))
    beta = (1 - 1 / (step + 1)) ** (gamma_of(LENGTH) + 1)
    average = jax.tree.map(lambda p, n: beta * -3 * p + (1 - beta) * n, PARAMS, params)
    close(state.averages, {f"{LENGTH:g}": average})
    assert state.step == step + 1 and state.step.dtype == jnp.int32


def test_noise_depends_on_seed_step_and_place():
    seen = {float(stepped(step, seed)[1]["noise"]) for step in (0, 1) for seed in (0, 1)}
    assert len(seen) == 4
    key = jax.random.key(7)
    assert len(np.unique(numbers(example_keys(key, 8)))) == 8
    np.testing.assert_array_equal(numbers(example_keys(key, 8))[:3], numbers(example_keys(key, 3)))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_in_parts_gives_what_the_whole_gives(parts):
    state, metrics = stepped(accumulate=parts)
    wanted, whole = stepped()
    close(metrics, whole)
    close(state.params, wanted.params)


def test_every_part_takes_each_so_many_th_example():
    tree = {"a": jnp.arange(6), "b": jnp.arange(12).reshape(6, 2)}
    found = in_parts(tree, 3)
    np.testing.assert_array_equal(found["a"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(found["b"], np.arange(12).reshape(2, 3, 2).swapaxes(0, 1))


@pytest.mark.parametrize(("pattern", "trained"), [("", "ab"), ("kernel$", "b"), (r"^a$", "a")])
def test_only_what_a_pattern_finds_is_trained(pattern, trained):
    part, optimizer = only(pattern, loss, optax.adamw(RATE, weight_decay=0.5))
    gradient, full = (
        jax.grad(lambda p, of=of: of(p, batch(), example_keys(jax.random.key(0), BATCH))[0].mean())(
            PARAMS
        )
        for of in (part, loss)
    )
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    for name in PARAMS:
        leaf, whole, moved = (jax.tree.leaves(tree[name])[0] for tree in (gradient, full, updates))
        np.testing.assert_array_equal(leaf, whole if name in trained else 0.0)
        assert np.any(moved != 0.0) == (name in trained)


def test_a_pattern_that_finds_nothing_is_named():
    _, optimizer = only("kernels", loss, optax.sgd(RATE))
    with pytest.raises(ValueError, match="trainable 'kernels' finds no parameter"):
        optimizer.init(PARAMS)
