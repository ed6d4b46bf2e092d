"""A workdir keeps no config that was refused, whenever it is found to be wrong."""

import os

import pytest

from composer_jax.cli import main

POOLS = f"--config.pools={os.environ['COMPOSER_TEST_POOLS']}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dtype=fp32", "did you mean 'float32'"),
        ("optimizer.betas=0.9", "a list of 2 values"),
        ("optimizer.groups=(('nosuch', 0.5),)", "'nosuch' finds no parameter"),
        ("trainable=nosuch", "'nosuch' finds no parameter"),
        ("held_out=folder:nowhere", "nowhere does not exist"),
    ],
)
def test_a_refused_config_is_not_kept(override, says, tmp_path, capsys):
    words = ["train", "--config", "scenes64_depth:smoke", "--workdir", str(tmp_path), POOLS]
    assert main([*words, f"--config.{override}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("composer: ") and says in error
    assert not list(tmp_path.iterdir())
