"""CLIP's own network: the peer's numbers, the peer's files, and clear words where they are off."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import serialization, traverse_util
from jax.flatten_util import ravel_pytree

from composer_jax.models.clip import Clip, small_clip
from composer_jax.models.clip_files import Preprocess
from composer_jax.models.files import in_memory, open_tensors, write_tensors

CAPTIONS = ["a red cone", "a small shiny blue ball on a green floor", "two cubes!"]
FLAX = hasattr(transformers, "FlaxCLIPModel")
needs_flax = pytest.mark.skipif(not FLAX, reason="transformers 5 has no Flax model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved CLIP; all its parameters differ from where training starts."""
    clip = small_clip(CAPTIONS, image_size=16, seed=1, backend="nnx")
    rng, start = np.random.default_rng(2), jax.device_get(clip.params)
    moved = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), start)
    folder = tmp_path_factory.mktemp("clip") / "model"
    clip.with_params(moved).save(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return Clip.load(folder, backend="nnx")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the directory in which `edit(name, change)` changes a JSON file."""
    target = tmp_path / "copy"
    shutil.copytree(folder, target)

    def edit(name, change):
        values = json.loads((target / name).read_text())
        change(values)
        (target / name).write_text(json.dumps(values))
        return target

    return edit


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def off(ours, peer):
    """Relative L2 distance."""
    return np.linalg.norm(np.asarray(ours) - peer) / np.linalg.norm(peer)


def outputs(clip):
    return [*clip.text(CAPTIONS).values(), clip.image(images(3))]


@needs_flax
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"hidden_act": "gelu", "eos_token_id": 2}, {"skip": 1, "pad": "!"}),  # as SD 2's
    ],
)
def test_both_networks_give_the_same(copy, changes, options):
    folder = copy("config.json", lambda config: config["text_config"].update(changes))
    ours, peer = (Clip.load(folder, backend=backend, **options) for backend in ("nnx", "flax"))
    assert (ours.backend, peer.backend, Clip.load(folder).backend) == ("nnx", "flax", "flax")
    assert jax.tree.structure(ours.params) == jax.tree.structure(peer.params)
    (ids, *arrays), (peer_ids, *peer_arrays) = outputs(ours), outputs(peer)
    np.testing.assert_array_equal(ids, peer_ids)
    for array, peer_array in zip(arrays, peer_arrays, strict=True):
        assert off(array, peer_array) < 1e-5


def test_training_moves_both_networks_alike(clip, folder):
    batch, ids, optimizer = images(3), clip.tokenize(CAPTIONS), optax.adam(2e-4)
    gradients = {}
    for backend in ("nnx", "flax") if FLAX else ("nnx",):
        loss = Clip.load(folder, backend=backend).loss
        given, nested = ravel_pytree(clip.params)

        @jax.jit
        def step(params, state, loss=loss, nested=nested):  # on all parameters as one array
            mean = lambda p: loss(nested(p), batch, ids)[0].mean()  # noqa: E731
            value, grads = jax.value_and_grad(mean)(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value, grads

        gradients[backend] = nested(step(given, optimizer.init(given))[-1])
        if backend == "flax":  # whose training is asked for in clip_test.py
            continue
        params, _ = ravel_pytree(small_clip(CAPTIONS, image_size=16, backend=backend).params)
        state, losses = optimizer.init(params), []
        for _ in range(60):
            params, state, value, _ = step(params, state)
            losses.append(float(value))
        assert losses[0] > 1.0 and losses[-1] < 0.3
    ours = traverse_util.flatten_dict(gradients["nnx"], sep=".")
    assert all(np.any(gradient) for gradient in ours.values())
    for name, peer in traverse_util.flatten_dict(gradients.get("flax", {}), sep=".").items():
        # A key's bias moves no attention: its gradient is 0 but for rounding.
        size = 1.0 if name.endswith("k_proj.bias") else np.linalg.norm(peer)
        assert np.linalg.norm(ours[name] - peer) < 1e-5 * size, name


def test_small_clips_do_not_depend_on_the_backend(clip):
    other = small_clip(CAPTIONS, image_size=16, seed=1)
    same = small_clip(CAPTIONS, image_size=16, seed=1, backend="nnx")
    for ours, theirs in zip(*map(jax.tree.leaves, (same.params, other.params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert clip.sizes == {"text_length": 48, "text_width": 128, "embed_width": 128}


def test_the_hidden_state_before_the_last_layer_is_that_of_a_shorter_tower(clip, folder, copy):
    shorter = copy("config.json", lambda config: config["text_config"].update(num_hidden_layers=2))
    tensors = open_tensors(shorter / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.2." not in name or "vision" in name}
    write_tensors(shorter / "model.safetensors", kept)
    skipped = Clip.load(folder, backend="nnx", skip=1)
    ours, wanted = skipped.text(CAPTIONS), Clip.load(shorter, backend="nnx").text(CAPTIONS)
    assert off(ours["tokens"], wanted["tokens"]) < 1e-6
    np.testing.assert_array_equal(ours["vector"], clip.text(CAPTIONS)["vector"])
    assert off(ours["tokens"], clip.text(CAPTIONS)["tokens"]) > 0.1


def test_another_padding_fills_up_after_the_end_and_leaves_the_vector(clip, folder):
    padded = Clip.load(folder, backend="nnx", pad="!")
    end, mark = clip.config.text_config.eos_token_id, clip.tokenizer.id("!")
    ids = padded.tokenize(CAPTIONS)
    assert np.count_nonzero(ids == end, axis=1).tolist() == [1, 1, 1]
    np.testing.assert_array_equal(np.where(ids == mark, end, ids), clip.tokenize(CAPTIONS))
    ours, usual = padded.text(CAPTIONS), clip.text(CAPTIONS)
    assert off(ours["vector"], usual["vector"]) < 1e-6
    assert off(ours["tokens"], usual["tokens"]) > 0.01


def test_a_model_read_with_options_is_written_whole(folder, tmp_path):
    Clip.load(folder, backend="nnx", skip=1, pad="!").save(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    again = Clip.load(tmp_path / "again", backend="nnx")
    assert (
        again.tokenize(["a"]).tolist() == Clip.load(folder, backend="nnx").tokenize(["a"]).tolist()
    )


def rewrite(folder, change):
    """Rewrites the weights: `change` takes and gives a dict of tensors."""
    path = folder / "model.safetensors"
    arrays = {name: in_memory(t.read()) for name, t in open_tensors(path).items()}
    write_tensors(path, change(arrays))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards_are_read(clip, copy, dtype):
    folder = copy("config.json", lambda config: None)
    arrays = open_tensors(folder / "model.safetensors")
    half = {name: tensor.cast(dtype) for name, tensor in arrays.items()}
    names = list(half)
    parts = {"model-00001-of-00002.safetensors": names[:99],
             "model-00002-of-00002.safetensors": names[99:]}  # fmt: skip
    for file, part in parts.items():
        write_tensors(folder / file, {name: half[name] for name in part})
    places = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    read = traverse_util.flatten_dict(Clip.load(folder, backend="nnx").params, sep=".")
    for name, array in traverse_util.flatten_dict(clip.params, sep=".").items():
        assert read[name].dtype == jnp.float32
        np.testing.assert_array_equal(read[name], array.astype(dtype).astype(jnp.float32))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors"):
        Clip.load(folder)


def test_flaxs_layout_is_read_from_both_formats(clip, copy):
    folder = copy("config.json", lambda config: None)
    flat = traverse_util.flatten_dict(clip.params, sep=".")
    write_tensors(folder / "model.safetensors", {n: in_memory(a) for n, a in flat.items()})
    again = [Clip.load(folder, backend="nnx").params]
    (folder / "model.safetensors").unlink()
    packed = serialization.msgpack_serialize(jax.device_get(clip.params))
    (folder / "flax_model.msgpack").write_bytes(packed)
    again.append(Clip.load(folder, backend="nnx").params)
    for params in again:
        jax.tree.map(np.testing.assert_array_equal, params, clip.params)
    (folder / "flax_model.msgpack").write_bytes(packed[:-999])
    with pytest.raises(ValueError, match=r"flax_model\.msgpack is broken"):
        Clip.load(folder)


def test_a_directory_of_transformers_5_is_read(clip, copy, folder):
    target = copy("config.json", lambda config: None)
    fast = transformers.CLIPTokenizerFast.from_pretrained(folder)
    fast.backend_tokenizer.save(str(target / "tokenizer.json"))
    described = json.loads((target / "preprocessor_config.json").read_text())
    described |= {"crop_size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5]}
    (target / "processor_config.json").write_text(json.dumps({"image_processor": described}))
    for name in ("vocab.json", "merges.txt", "preprocessor_config.json"):
        (target / name).unlink()
    read = Clip.load(target, backend="nnx")
    np.testing.assert_array_equal(read.tokenize(CAPTIONS), clip.tokenize(CAPTIONS))
    assert read.preprocess.mean == (0.5, 0.5, 0.5)
    read.save(target / "again")
    again = Clip.load(target / "again")
    np.testing.assert_array_equal(again.tokenize(CAPTIONS), clip.tokenize(CAPTIONS))
    vocabularies = [json.loads((f / "vocab.json").read_text()) for f in (target / "again", folder)]
    assert vocabularies[0] == vocabularies[1]


def drop(name):
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("logit_scale"), r"lacks the tensor logit_scale \[\]"),
        (
            lambda tensors: tensors | {"text_model.extra": tensors["logit_scale"]},
            r"has a tensor that the model lacks: text_model\.extra \[\]",
        ),
        (
            lambda tensors: (
                tensors | {"text_projection.weight": in_memory(np.zeros((128, 64), np.float32))}
            ),
            r"text_projection\.weight is \[128, 64\], the model wants \[128, 128\]",
        ),
        (
            lambda tensors: tensors | {"logit_scale": in_memory(np.float32(np.nan))},
            "logit_scale holds numbers that are not finite",
        ),
    ],
)
def test_a_tensor_that_is_off_is_named(copy, change, message):
    folder = copy("config.json", lambda config: None)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        Clip.load(folder)
    assert "\n" not in str(error.value)


def test_positions_that_old_releases_stored_are_passed_over(clip, copy):
    folder = copy("config.json", lambda config: None)
    name = "text_model.embeddings.position_ids"
    rewrite(folder, lambda tensors: tensors | {name: in_memory(np.zeros((1, 48), np.float32))})
    again = Clip.load(folder, backend="nnx").params
    jax.tree.map(np.testing.assert_array_equal, again, clip.params)


def test_damaged_files_end_in_one_line(copy, tmp_path):
    folder = copy("config.json", lambda config: None)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    whole = (folder / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    damage = {
        "is not what was written": ("model.safetensors", bytes(flipped)),
        "is not a whole safetensors file": ("model.safetensors", whole[:-8]),
        "lacks config.json": ("config.json", None),
        "lacks merges.txt": ("merges.txt", None),
        "is not JSON": ("config.json", b'{"model_type": '),
        "is broken": ("vocab.json", b"{"),
    }
    for message, (name, content) in damage.items():
        before = (folder / name).read_bytes()
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            Clip.load(folder, backend="nnx")
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(before)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="leads out of its directory"):
        Clip.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        Clip.load(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "hidden_size", "wide", "hidden_size"),
        ("text_config", "hidden_size", True, "hidden_size"),
        ("text_config", "num_attention_heads", 3, "heads"),
        ("text_config", "hidden_act", "relu", "hidden_act relu; it is gelu, quick_gelu"),
        ("text_config", "num_hidden_layers", 10**9, "more than 200 layers"),
        ("text_config", "eos_token_id", 5, "ends a text with token 5"),
        ("text_config", "vocab_size", 100, "has an id"),
        ("vision_config", "num_channels", 4, "num_channels is 4"),
        ("vision_config", "layer_norm_eps", -1.0, "layer_norm_eps is -1.0, not a positive number"),
        ("vision_config", "patch_size", None, "patch_size"),
    ],
)
def test_a_config_that_cannot_be_is_refused(copy, part, field, value, message):
    folder = copy("config.json", lambda config: config[part].update({field: value}))
    with pytest.raises(ValueError, match=message) as error:
        Clip.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", {"width": 16}, "height"),
        ("size", "big", "'big'|str"),
        ("resample", 99, "99"),
        ("image_std", [0, 0, 0], "three channels"),
        ("do_normalize", False, "do_normalize is False"),
        ("rescale_factor", 1.0, "rescale_factor is 1.0"),
    ],
)
def test_preprocessing_that_is_not_clips_is_refused(copy, field, value, message):
    folder = copy("preprocessor_config.json", lambda described: described.update({field: value}))
    with pytest.raises(ValueError, match=message) as error:
        Preprocess.load(folder, 16)
    assert "\n" not in str(error.value) and "preprocessor_config.json" in str(error.value)


def test_options_that_are_off_are_named(folder):
    with pytest.raises(ValueError, match="backend 'torch'; allowed: flax, nnx"):
        Clip.load(folder, backend="torch")
    with pytest.raises(ValueError, match="skip is 3; this CLIP has 3 layers, 0 to 2 go"):
        Clip.load(folder, skip=3)
    with pytest.raises(ValueError, match="'<pad>' is not in CLIP's vocabulary"):
        Clip.load(folder, pad="<pad>")


@pytest.mark.skipif(FLAX, reason="transformers 4 has the Flax model")
def test_without_transformers_model_ours_runs(folder):
    assert Clip.load(folder).backend == "nnx"
    with pytest.raises(ValueError, match="backend 'flax' needs transformers 4"):
        Clip.load(folder, backend="flax")


def test_the_same_parameters_whatever_the_folder_was_made_of(clip, folder):
    """A backend never shows in what is cached: the hash of the parameters is of the file alone."""
    other = Clip.load(folder)
    jax.tree.map(np.testing.assert_array_equal, clip.params, other.params)
