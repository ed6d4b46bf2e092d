"""The precision of float32's products: asked for, in force, taken back, and part of every key."""

import jax
import jax.numpy as jnp
import pytest

from composer_jax.cli import main
from composer_jax.sampling.compiled import Programs
from composer_jax.storage.programs import program_name
from composer_jax.training.config import load_config
from composer_jax.utils.precision import current_precision, matmul_precision


def traced():
    """The precision that a product is traced with."""
    x = jnp.ones((2, 2))
    (equation,) = jax.make_jaxpr(lambda x: jnp.dot(x, x))(x).eqns[-1:]
    return str(equation.params["precision"]).upper()


def test_it_holds_inside_and_is_taken_back():
    assert current_precision() == "default"
    with matmul_precision("highest"):
        assert current_precision() == "highest" and "HIGHEST" in traced()
        with matmul_precision(None):
            assert current_precision() == "highest"
    assert current_precision() == "default" and "HIGHEST" not in traced()
    with pytest.raises(KeyError), matmul_precision("high"):
        raise KeyError
    assert current_precision() == "default"
    allowed = "precision is 'best'; allowed: default, high, highest"
    with pytest.raises(ValueError, match=allowed), matmul_precision("best"):
        pass


def test_a_kept_program_is_of_one_precision(tmp_path, monkeypatch):
    names = []
    for precision in ("default", "high", "highest"):
        with matmul_precision(precision):
            names.append(program_name(["utils"], [], [jnp.ones(2)]))
    assert len(set(names)) == 3


def test_a_pipeline_traces_anew_where_the_precision_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    seen = []

    def run(kind, weights, inputs):
        seen.append(current_precision())
        return weights["w"] @ inputs["x"]

    class Kind:
        preview = False

    programs, kind = Programs(run, {}, tmp_path), Kind()
    programs._keep = tmp_path
    arrays = {"w": jnp.ones((2, 2))}, {"x": jnp.ones((2, 2))}
    for precision in ("default", "highest", "default"):
        with matmul_precision(precision):
            programs(kind, *arrays)
    assert seen == ["default", "highest"] and len(list(tmp_path.glob("*.stablehlo"))) == 2


def test_a_config_names_it():
    assert load_config("scenes64:smoke").precision == "default"
    assert load_config("scenes64:smoke", ["precision=highest"]).precision == "highest"
    with pytest.raises(ValueError, match="precision is 'best'"):
        load_config("scenes64:smoke", ["precision=best"])


@pytest.mark.parametrize("command", ["sample", "evaluate", "compile"])
def test_commands_take_it(command, tmp_path, capsys):
    assert main([command, "--out", str(tmp_path / "x"), "--precision", "hihest"]) == 2
    assert "did you mean 'highest'?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
