"""CLIP: the same answers as its peers, a vocabulary of its own, and training."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import skimage.data
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from composer_jax.models.bpe import build_vocabulary
from composer_jax.models.clip import Clip, contrastive_loss, small_clip
from composer_jax.models.clip_files import Preprocess

CAPTIONS = [
    "a large red cone left of a small shiny blue ball and a green cube on a grey floor",
    "a small shiny blue ball on a green floor",
    "a yellow torus behind a large matte purple cylinder on a white floor",
    "two small cubes, one red and one blue, on a brown floor",
]


@pytest.fixture(scope="module")
def clip():
    return small_clip(CAPTIONS, image_size=32, seed=3)


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "model"
    clip.save(folder)
    return folder


@pytest.fixture(scope="module")
def fast(folder):
    return transformers.CLIPTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer(folder):
    if not hasattr(transformers, "FlaxCLIPModel"):
        pytest.skip("transformers 5 has no Flax model; parity/ compares with PyTorch's")
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        return transformers.FlaxCLIPModel.from_pretrained(folder)


def processor_of(**options):
    """transformers' preprocessing without torchvision, which its version 5 names apart."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(**options)


def images(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def photos():
    return [skimage.data.astronaut(), skimage.data.chelsea()[:, :301], skimage.data.coffee()]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_embeddings_equal_the_peers(clip, folder, peer):
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    encoded = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")
    pixels = processor(photos(), return_tensors="np")["pixel_values"]

    @jax.jit
    def encode(params, encoded, pixels):
        ids = encoded["input_ids"]
        # with a mask: the vector is the same
        text = peer.get_text_features(**encoded, params=params)
        tokens = peer.module.apply(
            {"params": params},
            ids,
            jnp.ones_like(ids),
            np.tile(np.arange(48), (len(CAPTIONS), 1)),
            method=lambda module, *inputs: module.text_model(*inputs).last_hidden_state,
        )
        return text, tokens, peer.get_image_features(pixels, params=params)

    with jax.numpy_rank_promotion("allow"):
        text, tokens, image = encode(peer.params, dict(encoded), pixels)
    ours = clip.text(CAPTIONS)
    np.testing.assert_array_equal(ours["ids"], encoded["input_ids"])
    np.testing.assert_allclose(ours["vector"], unit(text), atol=1e-5)
    np.testing.assert_allclose(ours["tokens"], tokens, atol=1e-5)
    np.testing.assert_allclose(clip.image(photos()), unit(image), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "crop"), [(224, 224), (64, 64), (97, 64), ((50, 70), 50), (336, 336)]
)
def test_preprocessing_equals_the_peers_on_photos(size, crop):
    described = {"shortest_edge": size} if isinstance(size, int) else None
    described = described or {"height": size[0], "width": size[1]}
    processor = processor_of(size=described, crop_size=crop)
    ours = Preprocess.from_dict(processor.to_dict(), crop)
    for photo in photos():
        pixels = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        resized = ours.resize(photo) / 255.0
        np.testing.assert_allclose((resized - ours.mean) / ours.std, pixels, atol=1e-3)
    assert Preprocess.from_dict(ours.to_dict(), crop) == ours


def test_preprocessing_in_jax_is_the_same(clip):
    batch = images(2)
    expected = (batch / 255.0 - clip.preprocess.mean) / clip.preprocess.std
    np.testing.assert_allclose(clip.preprocess.pixels(batch), expected, atol=1e-5)


def test_a_ribbon_is_cropped_before_it_is_resized():
    ribbon = np.broadcast_to(np.arange(60_000)[None, :, None] // 300, (2, 60_000, 3))
    resized = Preprocess(64, (64, 64)).resize(ribbon.astype(np.uint8))
    assert resized.shape == (64, 64, 3) and set(np.unique(resized)) <= {99, 100}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_images_of_any_size_become_the_models(height, width):
    image = np.full((height, width, 3), 77, np.uint8)
    assert np.all(Preprocess(24, (24, 24)).resize(image) == 77)


def test_batches_give_what_single_ones_give_without_compiling_for_each_size(clip):
    batch = images(13)
    together = clip.image(batch)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    for count in range(1, 14):
        np.testing.assert_allclose(clip.image(batch[:count]), together[:count], atol=1e-5)
    assert clip.programs.image._cache_size() <= 3
    assert clip.image(batch[:0]).shape == (0, 128)
    assert clip.text([])["tokens"].shape == (0, 48, 128)


def test_a_saved_model_is_the_same_again(clip, folder):
    again = Clip.load(folder)
    assert again.sizes == {"text_length": 48, "text_width": 128, "embed_width": 128}
    np.testing.assert_array_equal(again.image(images(2)), clip.image(images(2)))
    np.testing.assert_array_equal(again.text(CAPTIONS)["ids"], clip.text(CAPTIONS)["ids"])


def test_what_is_loaded_twice_is_compiled_once(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first, again = Clip.load(folder), Clip.load(tmp_path / "copy")
    assert again.programs is first.programs
    assert Clip.load(folder, skip=1).programs is not first.programs
    with pytest.raises(ValueError, match="skip is True"):
        Clip.load(folder, skip=True)


@pytest.mark.parametrize("safe", [False, True])
def test_what_the_peer_saves_is_read(clip, folder, peer, tmp_path, safe):
    peer.save_pretrained(tmp_path, safe_serialization=safe)  # msgpack; safetensors, Flax's layout
    for file in folder.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    np.testing.assert_array_equal(
        Clip.load(tmp_path).text(CAPTIONS)["vector"], clip.text(CAPTIONS)["vector"]
    )


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_becomes_ids_between_start_and_end(clip, text):
    ids = clip.tokenize([text])[0]
    vocabulary = clip.tokenizer.vocabulary
    assert ids.shape == (48,) and ids.max() < clip.config.text_config.vocab_size
    assert ids[0] == vocabulary["<|startoftext|>"] and ids[-1] == vocabulary["<|endoftext|>"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_the_vocabulary_means_the_same_to_the_fast_tokenizer(clip, fast, text):
    expected = fast(text, padding="max_length", truncation=True, max_length=48)["input_ids"]
    assert clip.tokenize([text])[0].tolist() == expected


def test_words_of_the_captions_are_tokens_and_unseen_words_survive(clip):
    core = clip.tokenizer.core
    found = core.encode("A  small shiny BLUE ball", add_special_tokens=False).tokens
    assert found == [f"{word}</w>" for word in ("a", "small", "shiny", "blue", "ball")]
    text = core.decode(clip.tokenize(["a zebra, naïve 猫"])[0].tolist())
    assert text.replace("</w>", "") == "azebra,naïve猫"


def test_a_long_caption_is_cut_and_still_pooled_at_its_end(clip):
    long = clip.text([" ".join(["red"] * 500)])
    assert long["ids"][0, -1] == clip.config.text_config.eos_token_id
    assert np.count_nonzero(long["ids"] == clip.config.text_config.eos_token_id) == 1
    shorter = clip.text([" ".join(["red"] * 10)])
    assert np.abs(long["vector"] - shorter["vector"]).max() > 1e-3


def test_the_vocabulary_is_deterministic():
    vocabulary, merges = build_vocabulary(CAPTIONS)
    assert all(build_vocabulary(CAPTIONS) == (vocabulary, merges) for _ in range(10))
    assert sorted(vocabulary.values()) == list(range(512 + len(merges) + 2))
    assert len(build_vocabulary(CAPTIONS, size=520)[0]) == 520


def test_the_loss_of_a_perfect_and_of_a_blind_model():
    ids = np.arange(4)[:, None]
    perfect, metrics = contrastive_loss(np.eye(4), np.eye(4), np.log(100.0), ids)
    assert perfect.shape == (4,)
    assert perfect.max() < 1e-6 and metrics["accuracy"].min() == 1.0
    same = np.ones((4, 2)) / np.sqrt(2)
    blind, metrics = contrastive_loss(same, same, np.log(50.0), ids)
    np.testing.assert_allclose(blind, np.log(4.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], 0.02, rtol=1e-5)
    capped = contrastive_loss(np.eye(4), np.eye(4), 50.0, ids)[1]
    np.testing.assert_allclose(capped["temperature"], 0.01, rtol=1e-5)


def test_pairs_that_share_a_text_are_not_each_others_negatives():
    loss, metrics = contrastive_loss(np.eye(2), np.eye(2), 1.0, np.zeros((2, 5), np.int32))
    assert not loss.any() and metrics["accuracy"].min() == 1.0


def test_false_texts_are_wrong_answers_for_every_image():
    ids = np.arange(3)[:, None]
    text = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # the third is taken for the first's
    loss = contrastive_loss(np.eye(2), text, np.log(20.0), ids)[0]
    alone = contrastive_loss(np.eye(2), text[:2], np.log(20.0), ids[:2])[0]
    np.testing.assert_allclose(loss - alone, [np.log(2.0) / 2, 0.0], atol=1e-5)
    same = contrastive_loss(np.eye(2), text, np.log(20.0), ids[[0, 1, 0]])[0]
    np.testing.assert_allclose(same, alone, rtol=1e-6)  # the first's own words are not false


def test_training_pairs_images_with_their_captions(clip):
    batch, ids = images(4, seed=5), clip.tokenize(CAPTIONS)
    optimizer = optax.adam(1e-3)

    params, nested = ravel_pytree(clip.params)

    @jax.jit
    def step(params, state):  # on all parameters as one array
        def mean(params):
            loss, metrics = clip.loss(nested(params), batch, ids)
            return loss.mean(), metrics["accuracy"].mean()

        (loss, accuracy), grads = jax.value_and_grad(mean, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, accuracy

    state = optimizer.init(params)
    for _ in range(100):
        params, state, loss, accuracy = step(params, state)
    assert loss < 0.2 and accuracy == 1.0
    trained = clip.with_params(nested(params))
    similarity = trained.image(batch) @ trained.text(CAPTIONS)["vector"].T
    assert similarity.argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_mistakes_end_in_one_clear_line(clip, folder, tmp_path):
    def copy(name, **changed):
        target = tmp_path / name
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(changed.get(file.name, file.read_bytes()))
        return target

    config = json.loads((folder / "config.json").read_text())
    other = {**config, "text_config": {**config["text_config"], "hidden_size": 64}}
    no_weights = copy("pickle")
    (no_weights / "model.safetensors").rename(no_weights / "pytorch_model.bin")
    cases = {
        "no such directory": tmp_path / "nowhere",
        "owner/model": "clip",
        "is a pickle": no_weights,
        "is of a 'bert' model": copy(
            "bert", **{"config.json": json.dumps({**config, "model_type": "bert"}).encode()}
        ),
        "the model wants": copy("other", **{"config.json": json.dumps(other).encode()}),
        "is not JSON": copy("text", **{"config.json": b"hello"}),
        "is not a whole safetensors file": copy("cut", **{"model.safetensors": b"123456789"}),
        "the model takes 32 x 32": copy(
            "size", **{"preprocessor_config.json": b'{"size": 224, "crop_size": 224}'}
        ),
    }
    for message, source in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            Clip.load(source)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be a str, not float"):
        clip.text(["a", 3.0])
    with pytest.raises(ValueError, match="uint8 images"):
        clip.image(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[32, 32, 3\], not \[16, 16, 3\]"):
        clip.loss(clip.params, images(2, 16), clip.tokenize(CAPTIONS[:2]))
    with pytest.raises(ValueError, match="multiple of the patch size"):
        small_clip(CAPTIONS, image_size=30)


def test_a_user_sees_nothing_alarming(tmp_path):
    code = (
        "import sys; from composer_jax.models.clip import Clip, small_clip\n"
        "assert 'transformers' not in sys.modules\n"
        "small_clip(['a red ball'], image_size=8).save(sys.argv[1])\n"
        "Clip.load(sys.argv[1]).text(['red ' * 99])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, str(tmp_path / "clip")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
