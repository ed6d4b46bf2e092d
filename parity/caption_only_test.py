"""A composer with its caption alone, exported: diffusers' pipeline makes the same images."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx

from composer_jax.cli import main
from composer_jax.data.extractors import absent_values
from composer_jax.models.clip import Clip
from composer_jax.models.composer import Composer, ComposerConfig
from composer_jax.models.initializers import described, initialised
from composer_jax.models.unet import UNetConfig
from composer_jax.models.vae import VAE, VAEConfig
from composer_jax.storage.models import BUNDLED, load_model, save_model, save_part
from parity.stable_diffusion_test import distance, nchw, nhwc

LATENT, LOCAL, SIZE = 4, 16, 64
WIDE = {"cross_attention_dim": 96}  # another width than CLIP's words: these are projected


@pytest.fixture(params=[{}, WIDE], ids=["as they are", "projected"])
def composer(request, tmp_path):
    """A model directory of a composer of four conditions on SD's schedule, random weights."""
    clip = Clip.load(BUNDLED / "clip", skip=1)
    unet = UNetConfig(
        in_channels=LATENT + LOCAL, block_out_channels=(32, 64), attention=(True, False),
        heads=(4, 4), layers_per_block=1, cross_attention_dim=128,
    )  # fmt: skip
    config = ComposerConfig(
        replace(unet, **request.param), ("sketch", "caption", "palette", "depth"), clip.sizes,
        latent_channels=LATENT, local_channels=LOCAL, vectors="tokens", stem_width=8,
    )  # fmt: skip
    absent = absent_values(config.conditions, {"clip": clip})
    model = initialised(described(Composer, config, absent), 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: a + 0.05 * rng.standard_normal(a.shape, np.float32), nnx.state(model, nnx.Param)
    )
    nnx.update(model, params)
    codec = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    save_part(tmp_path / "parts" / "vae", initialised(described(VAE, codec), 1))
    clip.save(tmp_path / "parts" / "clip")
    info = {
        "process": {"prediction": "eps", "schedule": "sd", "zero_terminal_snr": False},
        "image_size": SIZE, "sampler": {"solver": "ddim", "steps": 5, "guidance": 3.0},
        "source": "none", "clip_text": {"skip": 1, "pad": "!"}, "step": 0,
    }  # fmt: skip
    save_model(tmp_path / "model", model, tmp_path / "parts", info)
    return tmp_path / "model"


def conditions_of(config: ComposerConfig, caption) -> dict:
    """Blanks for all conditions but the caption."""
    shapes = {name: config.parts(name) for name in config.conditions}
    values = {
        name: {key: np.zeros((1, *((SIZE, SIZE, p.shape[-1]) if p.kind == "spatial" else p.shape)),
                             np.float32) for key, p in parts.items()}
        for name, parts in shapes.items()
    }  # fmt: skip
    return values | {"caption": {key: caption[key] for key in ("tokens", "vector")}}


@nnx.jit
def evaluated(composer: Composer, values, x_t, t):
    """One evaluation with the caption alone."""
    names = composer.config.conditions
    strength = jnp.asarray([[float(name == "caption") for name in names]])
    encoded, absent = composer.encode(values), composer.encode_absent()
    return composer(x_t, jnp.full((1,), t), encoded, absent, strength)


def test_the_caption_alone_is_stable_diffusion(composer, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["convert", str(composer), "--to", "diffusers", "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert "of its caption alone; sketch, palette, depth have no counterpart there" in said
    assert {p.name for p in out.iterdir()} >= {"unet", "vae", "text_encoder", "tokenizer",
                                               "scheduler", "model_index.json"}  # fmt: skip
    theirs = StableDiffusionPipeline.from_pretrained(out)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.unet.config.in_channels == LATENT and theirs.unet.config.sample_size == 8
    model, prompt = load_model(composer, np.float32), "a red cone \u4e2d\u6587 left of a blue ball!"
    clip = Clip.load(model.clip, skip=1, pad="!")
    ids = theirs.tokenizer(prompt, padding="max_length", truncation=True).input_ids
    padding = clip.tokenizer.id("!"), clip.tokenizer.id("!</w>")  # in a text, what fills up is one
    wanted = clip.tokenize([prompt])[0]
    assert np.array_equal(np.where(wanted == padding[1], padding[0], wanted), ids)
    for text in (prompt.strip("!"), ""):
        given = conditions_of(model.composer.config, clip.text([text]))
        x_t = np.random.default_rng(1).standard_normal((1, 8, 8, LATENT), np.float32)
        with torch.no_grad():
            context, _ = theirs.encode_prompt(text, "cpu", 1, False)
            for t in (3.0, 421.0, 999.0):
                peer = theirs.unet(nchw(x_t), torch.tensor([t]), context).sample
                found = evaluated(model.composer, given, x_t, t)
                assert distance(found, nhwc(peer)) < 1e-5
    with torch.no_grad():
        decoded = nhwc(theirs.vae.decode(nchw(x_t) / theirs.vae.config.scaling_factor).sample)
        images = theirs("a cone", num_inference_steps=2, output_type="np").images
    assert distance(model.vae.decode(x_t), decoded) < 1e-5
    assert images.shape == (1, SIZE, SIZE, 3) and np.isfinite(images).all()
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionPipeline"
    )
