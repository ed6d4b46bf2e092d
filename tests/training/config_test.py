"""Configs: found by name and path, overridden with care, kept with the run."""

import json
from pathlib import Path

import composer_jax.configs as configs
import pytest

from composer_jax.models.unet import UNetConfig
from composer_jax.training.composer import chance_of
from composer_jax.training.config import check_kept, keep_config, load_config
from composer_jax.utils.atomic import WriteError
from tests.disks import file_limit

pytestmark = pytest.mark.fast


def test_overrides_take_the_type_that_is_there():
    config = load_config(
        "scenes64:quick",
        ["steps=7", "optimizer.learning_rate=1", "source=folder:x", "conditions=palette,depth"],
    )
    assert config.steps == 7 and config.optimizer.learning_rate == 1.0
    assert config.source == "folder:x" and config.conditions == ("palette", "depth")


@pytest.mark.parametrize("path", sorted(Path(configs.__path__[0]).glob("[!_]*.py")), ids=str)
def test_every_config_loads_and_says_how_it_is_run(path):
    config = load_config(path.stem)
    assert config.task in ("codec", "clip", "depth", "objects", "composer")
    assert f"composer train --config {path.stem}" in path.read_text()
    if config.task == "composer":
        unet = UNetConfig.from_dict(config.model.unet.to_dict())
        assert unet.in_channels == unet.out_channels + config.model.local_channels
        assert load_config(f"{path.stem}:smoke").steps < 10


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("scene64", [], "did you mean 'scenes64'"),
        ("scenes64:fast", [], "no variant 'fast'"),
        ("missing.py", [], "missing.py does not exist"),
        ("scenes64", ["stepz=3"], "did you mean 'steps'"),
        ("scenes64", ["steps=many"], r"steps is 'many'; a whole number from 1"),
        ("scenes64", ["save_every=0"], "save_every is 0; a whole number from 1 to"),
        ("scenes64_depth", ["sample_every=-1"], "sample_every is -1; a whole number from 0"),
        ("scenes64_clip", ["altered=-1"], "altered is -1; a whole number from 0 to 64"),
        ("scenes64", ["steps=1.5"], r"steps is 1\.5; a whole number"),
        ("scenes64", ["optimizer=3"], "is a group"),
        ("scenes64", ["optimizer.rate=3"], "no key 'optimizer.rate'"),
        ("scenes64", ["steps"], "wants a value"),
    ],
)
def test_wrong_configs_end_in_one_line(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(name, overrides)


def test_a_config_file_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from composer_jax.configs import scenes64\n"
        "def get_config(variant=''):\n"
        "    config = scenes64.get_config('smoke')\n"
        "    config.seed = 5 if variant == 'five' else 4\n"
        "    return config\n"
    )
    assert load_config(f"{path}:five").seed == 5


def test_the_home_folder_in_a_config_file_and_in_a_run_of_before(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path, kept = tmp_path / "mine.py", tmp_path / "config.json"
    path.write_text(
        "from composer_jax.configs import scenes64\n"
        "def get_config():\n"
        "    config = scenes64.get_config('smoke')\n"
        "    config.codec, config.source = '~/codec', 'folder:~/photos'\n"
        "    return config\n"
    )
    config = load_config(str(path))
    assert (config.codec, config.source) == ("/home/me/codec", "folder:/home/me/photos")
    keep_config(config, tmp_path)
    kept.write_text(kept.read_text().replace("/home/me", "~"))
    check_kept(config, tmp_path)


def test_a_run_that_goes_on_has_the_same_config(tmp_path):
    keep_config(load_config("scenes64:smoke"), tmp_path)
    keep_config(load_config("scenes64:smoke", ["steps=9"]), tmp_path)
    with pytest.raises(ValueError, match=r"model\.stem_width = 48, the config says 32"):
        keep_config(load_config("scenes64:smoke", ["model.stem_width=32"]), tmp_path)
    keep_config(load_config("scenes64:smoke", ["optimizer.learning_rate=1e-5"]), tmp_path)
    with pytest.raises(ValueError, match=r"optimizer\.name = 'adamw', the config says 'muon'"):
        keep_config(load_config("scenes64:smoke", ["optimizer.name=muon"]), tmp_path)


def test_a_run_begun_before_a_key_was_there_goes_on(tmp_path):
    keep_config(load_config("scenes64:smoke"), tmp_path)
    path = tmp_path / "config.json"
    kept = json.loads(path.read_text())
    del kept["optimizer.mu_dtype"], kept["trainable"]
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"optimizer\.mu_dtype = 'float32', the config says"):
        keep_config(load_config("scenes64:smoke", ["optimizer.mu_dtype=bfloat16"]), tmp_path)
    keep_config(load_config("scenes64:smoke"), tmp_path)


def test_maps_may_be_kept_less_often_than_the_rest():
    chances = lambda *overrides: [  # noqa: E731
        chance_of(load_config("scenes64", overrides), name) for name in ("caption", "sketch")
    ]
    assert chances("keep=0.5", "keep_maps=0.25") == [0.5, 0.25]
    own = load_config("sd15_composer:smoke")
    assert [chance_of(own, name) for name in ("caption", "sketch", "intensity")] == [0.5, 0.5, 0.3]
    assert chances("keep_maps=0.25", "keep_each.sketch=0.9") == [0.5, 0.9]
    with pytest.raises(ValueError, match=r"keep_each\.caption is -1\.0; a number from 0 to 1"):
        chances("keep_each.caption=-1.0")
    with pytest.raises(ValueError, match=r"did you mean 'keep_each\.caption'"):
        chances("keep_each.captoin=0.5")
    with pytest.raises(ValueError, match=r"keep_maps is 1\.5; a number from 0 to 1, or None"):
        chances("keep_maps=1.5")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": 4'])
def test_a_damaged_config_is_written_again_unless_a_run_has_begun(tmp_path, content, caplog):
    config = load_config("scenes64:smoke")
    (tmp_path / "config.json").write_text(content)
    check_kept(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == content
    keep_config(config, tmp_path)
    assert "config.json is damaged; it is written again" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == config.steps
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config.json is damaged.*delete it to go on from"):
        keep_config(config, tmp_path)


@pytest.mark.parametrize(
    "name", ["model", "parts", "samples", "ema", "metrics.jsonl", "composer.json"]
)
def test_what_others_wrote_is_refused_as_a_workdir(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, of no run"):
        check_kept(load_config("scenes64:smoke"), tmp_path)


def test_a_full_disk_leaves_no_half_config(tmp_path):
    config = load_config("scenes64:smoke")
    with file_limit(100), pytest.raises(WriteError, match=r"run/config.json cannot be written"):
        keep_config(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    keep_config(config, tmp_path / "run")
