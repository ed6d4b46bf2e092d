"""The held-out loss: the average's, the same numbers at every call and on any mesh."""

import cv2
import jax
import numpy as np
import pytest

from composer_jax.commands.train import train
from composer_jax.training.config import load_config
from composer_jax.training.held_out import held_out_loss
from composer_jax.training.step import example_keys
from tests.training import toy
from tests.training.toy import fit, rows, settings


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("mesh", "parts", "count"), [((1, 1, 8), 1, 48), ((2, 4, 1), 2, 48), ((2, 4, 1), 2, 37)]
)
def test_it_is_the_averages_loss_by_the_same_draws_each_time(tmp_path, mesh, parts, count):
    options = {"part": (0, 1), "seed": 5, "dtype": "float32", "accumulate": parts}
    hook = held_out_loss(toy.loss, toy.batch, count, 16, **options)
    told = []

    def twice(step, state):
        wanted = [toy.loss(jax.device_get(state.ema), toy.batch(i), keys(i))[0] for i in range(3)]
        found = hook(step, state)
        assert found == hook(step, state)
        np.testing.assert_allclose(
            found["held_out_loss"], np.concatenate(wanted)[:count].mean(), rtol=1e-5
        )
        told.append(found["held_out_loss"])
        return found

    def keys(i):
        return example_keys(jax.random.fold_in(jax.random.key(5), i), 16)

    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    fit(tmp_path, settings(6, mesh=sizes), hooks=[(2, twice)])
    logged = [row["held_out_loss"] for row in rows(tmp_path) if "held_out_loss" in row]
    assert logged == told and len(told) == 3
    assert told[-1] < told[0]


def test_a_config_names_what_is_held_out(tmp_path):
    config = load_config("scenes64_depth:smoke", ["held_out=scenes:20", "held_out_every=2"])
    task = train(config, tmp_path)
    told = [row for row in rows(tmp_path) if "held_out_loss" in row]
    assert [row["step"] for row in told] == [2, 4] and task.data.held_out_count == 20
    held_out = task.data.shown["image"]
    trained = {image.tobytes() for image in task.data.pool["image"]}
    assert len(held_out) == 20 and not trained & {image.tobytes() for image in held_out}


def test_what_is_trained_on_is_not_held_out(tmp_path):
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((64, 64, 3), np.uint8))
    where = f"folder:{tmp_path}"
    config = load_config("scenes64_depth:smoke", [f"source={where}", f"held_out={where}"])
    with pytest.raises(ValueError, match="held_out is the source itself"):
        train(config, tmp_path / "run")
