"""Tasks: a batch's loss is the mean of its examples' own, so that it may be cut anywhere."""

import jax
import numpy as np
import pytest

from composer_jax.training.config import load_config
from composer_jax.training.step import example_keys, in_parts
from composer_jax.training.tasks import make_task, open_data


@pytest.mark.parametrize("name", ["codec", "depth", "objects"])
def test_each_example_has_a_loss_of_its_own(tmp_path, name):
    config = load_config(f"scenes64_{name}:smoke", ["source=scenes:8", "batch=8"])
    task = make_task(config, open_data(config.source, config), tmp_path)
    params = jax.tree.map(
        lambda p: np.asarray(p) + 0.02 * np.random.default_rng(p.size).normal(size=p.shape),
        jax.tree.map(lambda t: t.read() if hasattr(t, "read") else t, task.params),
    )
    batch, keys = task.data.batch(0), example_keys(jax.random.key(1), 8)
    loss = jax.jit(task.loss)
    values, metrics = whole = loss(params, batch, keys)
    assert {leaf.shape for leaf in jax.tree.leaves(whole)} == {(8,)}
    assert len(np.unique(values)) == 8 and all(np.ptp(m) > 0 for m in metrics.values())
    bits = jax.random.key_data(keys)
    parts = in_parts((batch, bits, whole), 4)
    for i in range(4):
        examples, own, wanted = jax.tree.map(lambda leaf, i=i: leaf[i], parts)
        found = loss(params, examples, jax.random.wrap_key_data(own))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, wanted
        )
