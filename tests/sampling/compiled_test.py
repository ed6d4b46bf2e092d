"""Programs kept as StableHLO: the same images, nothing traced, nothing stale."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.sampling.compiled import Programs
from composer_jax.sampling.program import Kind
from composer_jax.storage import programs as programs_kept

WEIGHTS = {"a.kernel": jnp.ones((3, 3))}
INPUTS = {"x": np.ones((2, 3), np.float32), "gain": np.float32(2.0)}
KIND = Kind("euler")


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def programs(shipped, about=None, keep=None, traced=None):
    def run(kind, weights, inputs):
        (traced if traced is not None else []).append(kind)
        return {"y": inputs["gain"] * inputs["x"] @ weights["a.kernel"]}

    made = Programs(run, about or {}, shipped)
    made._keep = keep
    return made


def test_what_was_exported_runs_without_tracing(one_device, tmp_path):
    first = programs(tmp_path)
    path = first.export(tmp_path, KIND, WEIGHTS, INPUTS)
    traced = []
    found = programs(tmp_path, traced=traced)(KIND, WEIGHTS, INPUTS)
    np.testing.assert_allclose(found["y"], 6.0)
    assert not traced and path.name == first.name(KIND, WEIGHTS, INPUTS)
    assert b"cpython" not in path.read_bytes()  # MLIR, no pickle


def test_what_runs_is_kept_where_there_is_a_cache(one_device, tmp_path):
    keep, traced = tmp_path / "cache", []
    programs(tmp_path / "none", keep=keep, traced=traced)(KIND, WEIGHTS, INPUTS)
    assert len(traced) == 1 and len(list(keep.iterdir())) == 1
    programs(tmp_path / "none", keep=keep, traced=traced)(KIND, WEIGHTS, INPUTS)
    assert len(traced) == 1


def test_a_damaged_program_is_made_again(one_device, tmp_path, caplog):
    keep = tmp_path / "cache"
    programs(tmp_path / "none", keep=keep)(KIND, WEIGHTS, INPUTS)
    (path,) = keep.iterdir()
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        found = programs(tmp_path / "none", keep=keep)(KIND, WEIGHTS, INPUTS)
        np.testing.assert_allclose(found["y"], 6.0)
        assert programs_kept.open_program(path) and f"{path.name} is damaged" in caplog.text
        caplog.clear()


def test_a_program_that_cannot_be_kept_runs_and_it_is_said(one_device, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    made = programs(tmp_path / "none", keep=tmp_path / "file" / "cache")
    np.testing.assert_allclose(made(KIND, WEIGHTS, INPUTS)["y"], 6.0)
    assert "cannot be written" in caplog.text and "traced again" in caplog.text


def test_without_either_it_is_traced(one_device, tmp_path):
    traced = []
    made = programs(tmp_path / "none", traced=traced)
    made(KIND, WEIGHTS, INPUTS)
    made(KIND, WEIGHTS, INPUTS)
    assert len(traced) == 1 and made.count() == 1 and not list(tmp_path.iterdir())


def test_a_name_holds_everything_that_a_trace_depends_on(tmp_path, monkeypatch):
    def name(about=None, kind=KIND, weights=WEIGHTS, inputs=INPUTS):
        return programs(tmp_path, about).name(kind, weights, inputs)

    plain = name()
    assert plain == name()
    others = {
        name({"model": 1}),
        name(kind=Kind("heun")),
        name(weights={"a.kernel": jnp.ones((3, 3), jnp.bfloat16)}),
        name(inputs={**INPUTS, "x": np.ones((4, 3), np.float32)}),
    }
    monkeypatch.setattr(programs_kept, "fingerprint", lambda rooms: "other code")
    others.add(name())
    assert len(others) == 5 and plain not in others


def test_sampling_by_what_compile_wrote(run, tmp_path):
    """The commands, in processes of their own with one device: the same image, no tracing."""
    environment = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def composer(*words):
        command = [sys.executable, "-m", "composer_jax", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    given = ["--model", run, "--steps", 2]
    sample = ["sample", *given, "--palette", "#d62828", "--count", 1, "--out"]
    composer(*sample, tmp_path / "a")
    kept = Path(tmp_path / "cache" / "composer-jax" / "programs")
    assert len(list(kept.iterdir())) == 1
    composer(*sample, tmp_path / "b")
    composer("compile", *given, "--out", tmp_path / "programs")
    assert {path.name for path in (tmp_path / "programs").glob("*.stablehlo")} == {
        path.name for path in kept.iterdir()
    }
    images = [(tmp_path / out / "0000.png").read_bytes() for out in ("a", "b")]
    assert images[0] == images[1]
