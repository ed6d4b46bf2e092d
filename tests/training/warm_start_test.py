"""Warm start: the composer is the UNet it was built around, until something new is trained."""

import logging
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from composer_jax import conditions
from composer_jax.cli import main
from composer_jax.commands.train import train
from composer_jax.models.composer import Composer, ComposerConfig, silence
from composer_jax.models.files import Tensor, module_tensors, open_tensors
from composer_jax.models.initializers import described, initialised
from composer_jax.models.peers import to_peer
from composer_jax.models.pretrained import open_unet
from composer_jax.models.unet import UNet, UNetConfig
from composer_jax.training.composer import check_start
from composer_jax.training.config import load_config
from composer_jax.training.tasks import make_task, open_data
from composer_jax.training.warm_start import around, start_from
from composer_jax.utils.atomic import write_json
from tests.small import POOLS, small_config


@pytest.fixture(scope="module")
def sd(tmp_path_factory, drawn, save_sd):
    """A small Stable Diffusion's UNet as diffusers lays it out."""
    config = UNetConfig.from_dict(load_config("sd15_composer:smoke").model.unet.to_dict())
    unet = drawn(UNet, replace(config, in_channels=6), seed=1)
    return save_sd(tmp_path_factory.mktemp("sd"), unet)


@pytest.fixture(scope="module")
def started(sd):
    """A composer of all eight conditions around it, before its first step."""
    config = load_config("sd15_composer:smoke")
    sizes = {"text_length": 6, "text_width": 128, "embed_width": 10}
    names, unet = tuple(conditions.names()), UNetConfig.from_dict(config.model.unet.to_dict())
    config = ComposerConfig(
        unet, names, sizes, latent_channels=6, factor=4, stem_width=8, context_length=32
    )
    absent = {"caption": {"tokens": jnp.full((6, 128), 0.1), "vector": jnp.full((10,), 0.1)}}
    composer = described(Composer, config, absent)
    for name in names:
        silence(composer, name)
    nnx.update(composer, start_from(nnx.state(composer, nnx.Param), around(open_unet(sd), config)))
    return initialised(composer, 0)


def test_what_a_start_leaves_out_is_said(sd, tmp_path, caplog):
    source = shutil.copytree(sd, tmp_path / "sd")
    entries = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for more, told in (({}, []), ({"text_encoder": ["transformers", "CLIPTextModel"]}, ["text"])):
        caplog.clear()
        write_json(source / "model_index.json", entries | more)
        with caplog.at_level(logging.INFO, "composer_jax"):
            check_start(ConfigDict({"init_from": str(source)}))
        lines = [line for line in caplog.messages if "left out" in line]
        assert len(lines) == len(told)
        assert all(word in line for word, line in zip(told, lines, strict=True))


def values_of(config: ComposerConfig, batch: int) -> dict:
    rng = np.random.default_rng(0)

    def draw(part):
        shape = (64, 64, part.shape[-1]) if part.kind == "spatial" else part.shape
        return jnp.asarray(rng.random((batch, *shape), np.float32))

    return {
        name: {key: draw(part) for key, part in config.parts(name).items()}
        for name in config.conditions
    }


def test_with_a_caption_alone_it_is_the_unet_it_came_from(sd, started):
    config, t = started.config, jnp.asarray([7.0, 640.0])
    values, x_t = values_of(config, 2), jax.random.normal(jax.random.key(0), (2, 16, 16, 6))
    strength = jnp.asarray([[float(name == "caption") for name in config.conditions]] * 2)

    @nnx.jit
    def both(unet, composer):
        encoded, absent = composer.encode(values), composer.encode_absent()
        found = composer(x_t, t, encoded, absent, strength)
        return found, unet(x_t, t, values["caption"]["tokens"])

    found, wanted = map(np.asarray, both(open_unet(sd).load(), started))
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert len(config.conditions) == 8


def test_the_first_gradient_is_finite_and_opens_every_condition(started):
    graph, params, rest = nnx.split(started, nnx.Param, ...)
    values, x_t = values_of(started.config, 1), jnp.ones((1, 16, 16, 6))

    @jax.jit
    def gradient(params):
        def loss(params):
            composer = nnx.merge(graph, params, rest)
            given = composer.encode(values), composer.encode_absent(), jnp.ones((1, 8))
            return jnp.mean(composer(x_t, jnp.asarray([300.0]), *given) ** 2)

        return jax.grad(loss)(params)

    found = {
        name: t.read()
        for name, t in module_tensors(nnx.merge(graph, gradient(params), rest)).items()
    }
    assert all(np.isfinite(array).all() for array in found.values())
    starts = [name for name in found if re.search(r"(embeddings|tokens)\..*linear_2", name)]
    assert len(starts) == 10  # weights and biases: two tokens' vectors, three timestep embeddings
    for name in starts:
        assert np.abs(found[name]).max() > 0, name
    assert np.abs(found["unet.conv_in.kernel"][:, :, 4:]).max() > 0


def test_only_what_the_pattern_finds_is_trained(sd, tmp_path):
    pattern = r"^(?!unet\.)|^unet\.conv_in|attn2"
    overrides = [f"init_from={sd}", f"trainable={pattern}", "ema=0.0", POOLS]
    overrides.append("conditions=('caption','sketch')")
    train(load_config("sd15_composer:smoke", overrides), tmp_path / "run")
    after = open_unet(tmp_path / "run").tensors
    for name, tensor in open_unet(sd).tensors.items():
        if name != "conv_in.kernel":
            same = np.array_equal(tensor.read(), after[name].read())
            assert same == (re.search(pattern, f"unet.{name}") is None), name
    assert np.abs(after["conv_in.kernel"].read()[:, :, 4:]).max() > 0
    words = ["--to", "diffusers", "--only", "unet", "--out", str(tmp_path / "back")]
    assert main(["convert", str(tmp_path / "run"), *words]) == 0
    back = open_tensors(tmp_path / "back" / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = to_peer(after)
    assert back.keys() == wanted.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor.read(), wanted[name].read())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.unet.heads=(4,4)", r"model\.unet\.heads is \[4, 4\]"),
        (
            "model.local_channels=8",
            r"model\.unet\.in_channels is 22; .*, 14, is wanted",
        ),
        ("process.prediction=v", r"process\.prediction is 'v'; .* was trained with 'eps'"),
        ("trainable=unett", "trainable 'unett' finds no parameter"),
        ("init_from=nowhere", "unet nowhere: no such directory"),
    ],
)
def test_a_start_that_does_not_fit_is_named(sd, tmp_path, override, message):
    overrides = [f"init_from={sd}", override, POOLS]
    with pytest.raises(ValueError, match=message):
        train(load_config("sd15_composer:smoke", overrides), tmp_path)


def begun(overrides, workdir):
    """The tensors of a model that is exported before its first step."""
    config = small_config(overrides)
    task = make_task(config, open_data(config.source, config), workdir)
    params = [p.read() if isinstance(p, Tensor) else p for p in jax.tree.leaves(task.params)]
    task.export(jax.tree.unflatten(jax.tree.structure(task.params), map(jnp.asarray, params)), 0)
    return open_tensors(workdir / "model" / "unet.safetensors")


def test_a_composer_goes_on_from_another_with_fewer_conditions_and_more(run, tmp_path):
    fewer = [f"init_from={run}", "conditions=('sketch','caption')"]
    fewer.append("process.location=1.0")  # which times it learns from is no other process
    after = begun(fewer, tmp_path / "a")
    before = open_tensors(run / "model" / "unet.safetensors")
    assert {name for name in before if "sketch_map" in name} < after.keys() < before.keys()
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor.read(), before[name].read(), err_msg=name)

    more = begun([f"init_from={tmp_path / 'a'}"], tmp_path / "b")
    assert more.keys() == before.keys()
    assert not more["embeddings.palette_vector.linear_2.kernel"].read().any()  # new, silent
    assert more["embeddings.caption_vector.linear_2.kernel"].read().any()


def test_a_composer_may_be_taught_to_predict_something_else(run, tmp_path):
    overrides = [f"init_from={run}", "process.prediction=flow"]
    with pytest.raises(ValueError, match=r"trained with 'v'; .* init_any_process=True"):
        train(small_config(overrides), tmp_path / "a")
    before = open_tensors(run / "model" / "unet.safetensors")
    for name, tensor in begun([*overrides, "init_any_process=True"], tmp_path / "a").items():
        np.testing.assert_array_equal(tensor.read(), before[name].read(), err_msg=name)


def test_a_composer_of_another_size_is_no_start(run, tmp_path):
    overrides = [f"init_from={run}", "model.stem_width=24"]
    with pytest.raises(ValueError, match=r"stem_width is 24; .* was trained with 48"):
        train(small_config(overrides), tmp_path)
