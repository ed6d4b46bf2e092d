"""`composer convert`: there, back, and nothing written where something is wrong."""

import json
import os
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from composer_jax.cli import main
from composer_jax.models.clip import Clip
from composer_jax.models.files import in_memory, module_tensors, open_tensors, write_tensors
from composer_jax.models.layouts import compvis_unet_rules
from composer_jax.models.peers import to_peer
from composer_jax.models.unet import UNet, UNetConfig
from composer_jax.models.vae import VAE, VAEConfig
from composer_jax.storage.models import BUNDLED
from tests.disks import file_limit

UNET = UNetConfig(
    block_out_channels=(32, 64),
    attention=(True, False),
    heads=(8, 8),
    layers_per_block=1,
    cross_attention_dim=12,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd(drawn, save_sd, tmp_path_factory):
    codec = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
    unet, vae = (
        drawn(UNet, UNET, seed=1),
        drawn(VAE, codec, seed=2),
    )
    return save_sd(tmp_path_factory.mktemp("sd"), unet, vae)


def arrays(path):
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def test_stable_diffusion_comes_in_and_goes_back_as_it_was(sd, tmp_path, capfd):
    assert main(["convert", str(sd), "--out", str(tmp_path / "ours")]) == 0
    assert "wrote unet, vae in" in capfd.readouterr().out
    assert sorted(p.name for p in (tmp_path / "ours/vae").iterdir()) == [
        "composer-files.json", "config.json", "model.safetensors"
    ]  # fmt: skip
    out = ["--out", str(tmp_path / "back"), "--to", "diffusers"]
    assert main(["convert", str(tmp_path / "ours"), *out]) == 0
    for part in ("unet", "vae"):
        before, after = arrays(sd / part / WEIGHTS), arrays(tmp_path / "back" / part / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        before, after = (json.loads((d / part / "config.json").read_text())
                         for d in (sd, tmp_path / "back"))  # fmt: skip
        assert before == after
    assert sorted(os.listdir(tmp_path)) == ["back", "ours"]


def test_clip_comes_in_as_transformers_has_it(tmp_path):
    source = BUNDLED / "clip"
    assert main(["convert", str(source), "--out", str(tmp_path), "--dtype", "float16"]) == 0
    before, after = Clip.load(source), Clip.load(tmp_path / "clip")
    np.testing.assert_array_equal(before.tokenize(["a red cone"]), after.tokenize(["a red cone"]))
    for a, b in zip(*(jax.tree.leaves(clip.params) for clip in (before, after)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-10, atol=1e-6)


def test_one_of_several_is_asked_for(sd, tmp_path):
    assert main(["convert", str(sd), "--only", "vae", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_half_precision_is_asked_for(sd, tmp_path):
    out = ["--out", str(tmp_path), "--dtype", "float16"]
    assert main(["convert", str(sd / "vae"), *out]) == 0
    found = arrays(tmp_path / "vae" / "model.safetensors")
    assert {array.dtype for array in found.values()} == {np.dtype("float16")}


def test_a_model_goes_to_diffusers_or_is_told_why_not(run, tmp_path, capfd):
    assert main(["convert", str(run), "--to", "diffusers", "--out", str(tmp_path / "x")]) == 2
    assert "a UNet with patch 2 has no counterpart in diffusers" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_a_single_file_predicts_is_left_open_or_given(sd, drawn, tmp_path, capfd):
    config = replace(UNET, use_linear_projection=True, heads=(1, 1))
    unet = drawn(UNet, config, seed=1)
    path = tmp_path / "v2.safetensors"
    write_tensors(path, to_peer(module_tensors(unet), compvis_unet_rules(config)))
    ours = tmp_path / "ours"
    for words, said, process in (
        ([], "does not say what its UNet predicts; --prediction eps or v would", {}),
        (["--prediction", "v"], "wrote unet", {"prediction": "v", "schedule": "sd",
                                               "zero_terminal_snr": False}),
    ):  # fmt: skip
        assert main(["convert", str(path), "--out", str(ours), *words]) == 0
        assert said in capfd.readouterr().out
        assert json.loads((ours / "unet" / "config.json").read_text())["process"] == process
    again = tmp_path / "again"
    assert main(["convert", str(ours), "--out", str(again), "--prediction", "eps"]) == 0
    assert "unet predicts eps" in (said := capfd.readouterr().out) and "says v" in said
    config = json.loads((again / "unet" / "config.json").read_text())
    assert config["process"]["prediction"] == "eps"


@pytest.mark.parametrize(
    ("marks", "words", "process", "said"),
    [
        ((), [], {"prediction": "eps"}, "eps is assumed, as Stable Diffusion 1 predicts it"),
        ((), ["--prediction", "v"], {"prediction": "v"}, "unet predicts v"),
        ((), ["--prediction", "flow"], {"prediction": "flow", "schedule": "flow"}, "predicts flow"),
        (("v_pred",), [], {"prediction": "v", "zero_terminal_snr": False}, "unet predicts v"),
        (("v_pred", "ztsnr"), [], {"prediction": "v", "zero_terminal_snr": True}, "zero terminal"),
        (("ztsnr",), [], None, "is marked ztsnr but not v_pred"),
        (("ztsnr",), ["--prediction", "v"], {"prediction": "v", "zero_terminal_snr": True}, "v"),
    ],
)
def test_marks_of_single_files_and_what_overrules_them(
    drawn, tmp_path, capfd, marks, words, process, said
):
    unet, path = drawn(UNet, UNET, seed=1), tmp_path / "v1.safetensors"
    tensors = to_peer(module_tensors(unet), compvis_unet_rules(UNET))
    write_tensors(path, tensors | {mark: in_memory(np.zeros(0, np.float32)) for mark in marks})
    code = main(["convert", str(path), "--out", str(tmp_path / "ours"), *words])
    out = capfd.readouterr()
    assert said in (out.out if process else out.err) and code == (0 if process else 2)
    if process:
        config = json.loads((tmp_path / "ours" / "unet" / "config.json").read_text())
        assert process.items() <= config["process"].items()


def test_a_scheduler_goes_there_and_back_with_every_field(sd, tmp_path, capfd):
    source = shutil.copytree(sd, tmp_path / "source")
    path = source / "scheduler" / "scheduler_config.json"
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.24.0",
        "beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
        "timestep_spacing": "leading", "prediction_type": "v_prediction",
    }  # fmt: skip
    path.write_text(json.dumps(scheduler))
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), "--out", str(ours), "--only", "unet"]) == 0
    said = "unet predicts v, scaled_linear betas 0.00085 to 0.014; sampled by dpmpp2m, leading"
    assert said in capfd.readouterr().out
    config = json.loads((ours / "unet" / "config.json").read_text())
    assert config["process"]["beta_end"] == 0.014 and config["sampler"]["spacing"] == "leading"
    assert main(["convert", str(ours), "--out", str(back), "--to", "diffusers"]) == 0
    written = back / "scheduler" / "scheduler_config.json"
    assert json.loads(written.read_text()) == scheduler
    other = ["--out", str(tmp_path / "eps"), "--to", "diffusers", "--prediction", "eps"]
    assert main(["convert", str(ours), *other]) == 0
    written = json.loads((tmp_path / "eps" / "scheduler" / "scheduler_config.json").read_text())
    assert written["prediction_type"] == "epsilon" and written["beta_end"] == 0.014
    assert written["_class_name"] == "DPMSolverMultistepScheduler" and written["steps_offset"] == 1


def test_an_unknown_scheduler_is_refused_by_name_or_left_out(sd, tmp_path, capfd):
    source, out = shutil.copytree(sd, tmp_path / "source"), tmp_path / "out"
    path = source / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "LCMScheduler", "beta_end": 0.02}))
    words = ["convert", str(source), "--out", str(out), "--only", "unet"]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert "scheduler class 'LCMScheduler' is unknown" in said and "--prediction eps" in said
    assert not out.exists()
    assert main([*words, "--prediction", "eps"]) == 0
    config = json.loads((out / "unet" / "config.json").read_text())
    assert config["process"]["beta_end"] == 0.02 and "sampler" not in config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not a whole safetensors file"),
        (lambda path: path.rename(path.with_suffix(".bin")), "is a pickle, which can run code"),
        (lambda path: path.unlink(), "lacks vae/diffusion_pytorch_model.safetensors"),
        (lambda path: path.with_name("config.json").write_text("{}"), "the model wants [64]"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(sd, tmp_path, capfd, edit, message):
    source = shutil.copytree(sd, tmp_path / "source")
    edit(source / "vae" / WEIGHTS)
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("composer: ") and message in error
    assert os.listdir(tmp_path) == ["source"]


def test_numbers_that_break_late_leave_the_old_output(sd, tmp_path, capfd):
    source, out = shutil.copytree(sd, tmp_path / "source"), tmp_path / "out"
    assert main(["convert", str(source), "--out", str(out)]) == 0
    before = (out / "vae" / "model.safetensors").read_bytes()
    tensors = {n: in_memory(a) for n, a in arrays(source / "vae" / WEIGHTS).items()}
    last = list(tensors)[-1]
    tensors[last] = in_memory(np.full(tensors[last].shape, np.nan, np.float32))
    write_tensors(source / "vae" / WEIGHTS, tensors)
    assert main(["convert", str(source), "--out", str(out)]) == 2
    assert "holds numbers that are not finite" in capfd.readouterr().err
    assert (out / "vae" / "model.safetensors").read_bytes() == before


def test_what_cannot_be_converted_is_said(tmp_path, capfd):
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no network that can be converted" in capfd.readouterr().err
    assert main(["convert", "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "no such directory, and no hub name" in capfd.readouterr().err


def tree(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("source", "out", "named"),
    [
        ("sd", "sd", "lies in"),
        ("sd", "sd/unet", "lies in"),
        ("sd", "link", "lies in"),
        ("sd/vae", "sd", "is what is read"),
        ("link", "sd/new", "lies in"),
    ],
)
def test_nothing_that_is_read_is_written(sd, tmp_path, monkeypatch, capfd, source, out, named):
    shutil.copytree(sd, tmp_path / "sd")
    (tmp_path / "link").symlink_to("sd")
    before = tree(tmp_path)
    for folder in (tmp_path, tmp_path / out):
        if not folder.is_dir():
            continue
        monkeypatch.chdir(folder)
        place = "." if folder == tmp_path / out else out
        assert main(["convert", str(tmp_path / source), "--out", place]) == 2
        assert named in capfd.readouterr().err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("stranger", ["vae/notes.txt", "vae/a/b.bin", "unet", "vae/config.json"])
def test_what_others_wrote_is_never_replaced(sd, tmp_path, capfd, stranger):
    path = tmp_path / "out" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert main(["convert", str(sd), "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and path.name in error
    assert tree(tmp_path) == {f"out/{stranger}": b"mine"}


def test_a_network_of_ours_that_was_changed_stays(sd, tmp_path, capfd):
    words = ["convert", str(sd / "vae"), "--out", str(tmp_path / "out")]
    assert main(words) == 0 and main(words) == 0
    (tmp_path / "out/other").write_text("x")  # beside what is written
    assert main(words) == 0
    with (tmp_path / "out/vae/config.json").open("a") as file:
        file.write(" ")
    before = tree(tmp_path)
    assert main(words) == 2
    assert "vae holds config.json" in capfd.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("size", [0, 100, 5000, 300_000])
def test_a_full_disk_leaves_what_was_there_and_the_same_command_goes_on(sd, tmp_path, capsys, size):
    words = ["convert", str(sd), "--out", str(tmp_path / "a/out")]
    with file_limit(size):
        assert main(words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path}/a/out/unet" in error and "file system" in error and ".part" not in error
    assert os.listdir(tmp_path) == []
    assert main([*words, "--only", "vae"]) == 0
    before = tree(tmp_path)
    with file_limit(size):
        assert main(words) == 1
    assert tree(tmp_path) == before
    assert main(words) == 0
