"""A composer with its caption alone is a text-to-image UNet, or is refused with the reason."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.cli import main
from composer_jax.models.caption_only import open_caption_unet
from composer_jax.models.composer import Composer, ComposerConfig
from composer_jax.models.files import FORMAT, in_memory, module_tensors, open_tensors, write_tensors
from composer_jax.models.unet import UNetConfig
from composer_jax.utils.atomic import write_json

SIZES = {"text_length": 6, "text_width": 24, "embed_width": 10}
UNET = UNetConfig(
    in_channels=4 + 3, block_out_channels=(16,), attention=(True,), heads=(2,), layers_per_block=1,
    cross_attention_dim=24, norm_num_groups=4,
)  # fmt: skip
CONFIG = ComposerConfig(
    UNET, ("depth", "caption", "palette"), SIZES, factor=4, local_channels=3, stem_width=4,
    vectors="tokens", context_length=24,
)  # fmt: skip
ABSENT = {"caption": {"tokens": np.full((6, 24), 0.1), "vector": np.full((10,), 0.1)}}
PROCESS = {"prediction": "eps", "schedule": "sd", "zero_terminal_snr": False}


@pytest.fixture
def save(drawn, tmp_path):
    """Writes a composer of random numbers, changed by name, as training exports one."""

    def write(config=CONFIG, process=PROCESS, **changed):
        model = drawn(Composer, config, ABSENT, seed=1)
        tensors = module_tensors(model)
        for name, array in changed.items():
            name = name.replace("__", ".")
            tensors[name] = in_memory(np.full(tensors[name].shape, array, np.float32))
        folder = tmp_path / "model"
        folder.mkdir()
        write_tensors(folder / "unet.safetensors", tensors)
        absent = {name: list(parts) for name, parts in ABSENT.items()}
        write_json(folder / "model.json", {"format": FORMAT, "composer": config.to_dict(),
                                             "absent": absent, "process": process})  # fmt: skip
        return folder, model

    return write


@pytest.mark.parametrize("vectors", ["tokens", "both"])
def test_it_gives_what_the_composer_gives(save, vectors):
    """With `both` the sentence vector's last layer is a constant, as before training."""
    last = "embeddings__caption_vector__linear_2__"
    zeros = {f"{last}kernel": 0.0} if vectors == "both" else {}
    folder, model = save(replace(CONFIG, vectors=vectors), **zeros)
    if zeros:
        model.embeddings["caption_vector"].linear_2.kernel[...] = jnp.zeros_like(
            model.embeddings["caption_vector"].linear_2.kernel[...]
        )
    found, words, others = open_caption_unet(folder)
    assert found.config == replace(UNET, in_channels=4) and not words
    assert others == ("depth", "palette") and found.process == PROCESS
    keys = jax.random.split(jax.random.key(0), 2)
    x_t, tokens = jax.random.normal(keys[0], (1, 8, 8, 4)), jax.random.normal(keys[1], (1, 6, 24))
    values = {name: {key: jnp.ones((1, *((32, 32, 1) if part.kind == "spatial" else part.shape)))
                     for key, part in CONFIG.parts(name).items()}
              for name in CONFIG.conditions}  # fmt: skip
    values["caption"]["tokens"] = tokens

    @nnx.jit
    def both(composer, unet, t):
        encoded, absent = composer.encode(values), composer.encode_absent()
        strength = jnp.asarray([[0.0, 1.0, 0.0]])
        return composer(x_t, t, encoded, absent, strength), unet(x_t, t, tokens)

    wanted, given = map(np.asarray, both(model, found.load(), jnp.asarray([640.0])))
    assert np.linalg.norm(given - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_words_of_another_width_keep_their_projection(save):
    folder, model = save(replace(CONFIG, sizes=SIZES | {"text_width": 12}))
    words = open_caption_unet(folder)[1]
    assert words["kernel"].shape == (12, 24) and words["bias"].shape == (24,)
    wanted = model.tokens["caption_tokens"].kernel[...]
    np.testing.assert_array_equal(words["kernel"].read(), wanted)


@pytest.mark.parametrize(
    ("config", "process", "message"),
    [
        ({"vectors": "both"}, PROCESS, "sentence vector joins the timestep embedding"),
        ({"vectors": "timestep"}, PROCESS, "a composer with model.vectors=tokens goes there"),
        ({"conditions": ("depth", "palette")}, PROCESS, "is a composer without a caption"),
        ({}, {"prediction": "flow", "schedule": "flow", "zero_terminal_snr": False},
         "was trained on the flow schedule"),
    ],
)  # fmt: skip
def test_what_it_is_not_is_said(save, tmp_path, capfd, config, process, message):
    folder, _ = save(replace(CONFIG, **config), process)
    out = tmp_path / "out"
    assert main(["convert", str(folder), "--to", "diffusers", "--out", str(out)]) == 2
    assert message in capfd.readouterr().err
    assert not out.exists()


def test_its_unet_alone_is_written_with_its_scheduler(save, tmp_path, drawn, capfd):
    from composer_jax.models.clip import small_clip
    from composer_jax.models.vae import VAE, VAEConfig
    from composer_jax.storage.models import save_part

    folder, _ = save()
    info = json.loads((folder / "model.json").read_text())
    write_json(folder / "model.json", info | {"image_size": 64, "clip_text": {"skip": 1}})
    codec = VAEConfig(block_out_channels=(32, 32), layers_per_block=1)
    save_part(folder / "vae", drawn(VAE, codec, seed=2))
    small_clip(["a red cone"], image_size=8).save(folder / "clip")
    out = tmp_path / "out"
    assert main(["convert", str(folder), "--to", "diffusers", "--out", str(out)]) == 0
    assert "depth, palette have no counterpart there and are left out" in capfd.readouterr().out
    index = json.loads((out / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    assert all((out / name).is_dir() for name in parts) and len(parts) == 5
    layers = {name.split(".")[3] for name in open_tensors(out / "text_encoder/model.safetensors")
              if ".layers." in name}  # fmt: skip
    assert layers == {"0", "1"}  # of three: the last is skipped
    config = json.loads((out / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"]) == (4, 32)
    again = ["convert", str(folder), "--to", "diffusers", "--only", "unet"]
    assert main([*again, "--out", str(tmp_path / "unet_only")]) == 0
    assert {p.name for p in (tmp_path / "unet_only").iterdir()} == {"unet", "scheduler"}
    assert main([*again[:-2], "--out", str(out)]) == 0  # what we wrote is replaced
