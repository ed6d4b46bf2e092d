"""Averages by power functions: against the sum they stand for, and of any length afterwards."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from composer_jax.cli import main
from composer_jax.commands.train import train
from composer_jax.models.files import module_tensors, open_tensors
from composer_jax.storage.models import load_model
from composer_jax.training.ema import average, gamma_of, weights
from tests.small import small_config


def profile(steps: int, length: float) -> np.ndarray:
    """The weight of every step's parameters in the average after the last, from its recursion."""
    beta = (1.0 - 1.0 / np.arange(1, steps + 1)) ** (gamma_of(length) + 1.0)
    kept = np.append(np.cumprod(beta[:0:-1])[::-1], 1.0)  # by all later steps
    return (1.0 - beta) * kept


def test_the_exponents_that_the_paper_names():
    # arXiv 2312.02696, section 3.1: lengths of 5 % and 10 %
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    for length in (0.0, -0.1, 0.3):
        with pytest.raises(
            ValueError, match=r"EMA length is .*; a number from 0\.001 to 0\.28 is wanted"
        ):
            gamma_of(length)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_an_average_has_the_length_that_it_is_named_by(length):
    steps = 4000
    weight = profile(steps, length)
    t = (np.arange(steps) + 0.5) / steps
    mean = np.sum(weight * t)
    assert weight.sum() == pytest.approx(1.0)
    assert np.sqrt(np.sum(weight * (t - mean) ** 2)) == pytest.approx(length, rel=2e-3)


def test_the_steps_average_is_the_recursion():
    numbers, ema = np.random.default_rng(0).normal(size=50), jnp.zeros(())
    for step, number in enumerate(numbers, 1):
        ema = average(ema, jnp.asarray(number, jnp.float32), jnp.asarray(step), 0.1)
    np.testing.assert_allclose(ema, np.sum(profile(50, 0.1) * numbers), rtol=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.08, 0.15, 0.2])
def test_any_length_comes_out_of_two(length):
    steps, every = 4096, 128
    at = [step for step in range(every, steps + 1, every) for _ in (0, 1)]
    lengths = [0.05, 0.1] * (steps // every)
    factors = weights(at, lengths, steps, length)
    found = np.zeros(steps)
    for factor, step, each in zip(factors, at, lengths, strict=True):
        found[:step] += factor * profile(step, each)
    wanted = profile(steps, length)
    assert found.sum() == pytest.approx(1.0, abs=1e-2)
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


def test_a_length_that_was_kept_is_itself():
    factors = weights([100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1], 200, 0.1)
    np.testing.assert_allclose(factors, [0, 0, 0, 1], atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A composer of all eight conditions, trained for four steps: its workdir."""
    workdir = tmp_path_factory.mktemp("run")
    train(small_config(["ema_lengths=0.05,0.1", "sample_every=4"]), workdir)
    return workdir


def test_a_run_leaves_a_model_its_log_and_a_grid_of_samples(run):
    model = load_model(run)
    assert model.info["step"] == 4 and len(model.composer.config.conditions) == 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(np.isfinite(line["loss"]) for line in lines)
    rows = 1 + 6 + 1  # the images, each condition that is stored alone, and nothing
    assert Image.open(run / "samples" / "00000004.png").size == (8 * 66, rows * 66)


def test_a_run_gives_models_of_other_lengths(run, tmp_path, capsys):
    out = tmp_path / "other"
    kept = sorted(path.name for path in (run / "ema").glob("*"))
    assert kept == ["00000004-0.05.safetensors", "00000004-0.1.safetensors"]
    assert main(["ema", str(run), "--length", "0.1", "--out", str(out)]) == 0
    composer = module_tensors(load_model(out).composer)
    wanted = open_tensors(run / "ema" / "00000004-0.1.safetensors")
    assert set(composer) - set(wanted) == {"absent.caption.tokens", "absent.caption.vector"}
    for name, tensor in wanted.items():
        np.testing.assert_allclose(composer[name].read(), tensor.read(), rtol=1e-3, atol=1e-5)
    capsys.readouterr()
    for options, message in [
        (["--length", "0.5"], "--length: the value is 0.5; a number from 0.001 to 0.28"),
        (["--length", "0.1", "--step", "3"], "has snapshots of steps [4]; 3 is none"),
    ]:
        assert main(["ema", str(run), *options, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["ema", str(out), "--length", "0.1", "--out", str(tmp_path / "no")]) == 2
    assert "holds no snapshot of averages" in capsys.readouterr().err
