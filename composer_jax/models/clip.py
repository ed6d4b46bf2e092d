"""CLIP (arXiv 2103.00020): text and images to embeddings; transformers' Flax model inside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.models.bpe import END, START, build_vocabulary
from composer_jax.models.clip_files import (
    Preprocess,
    find_clip,
    read_json,
    read_weights,
    write_weights,
)

BATCHES = (1, 8, 64)  # the only batch sizes that are ever compiled
MAX_SCALE = 100.0  # CLIP's bound on the inverse temperature


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A text tower and an image tower that agree; `load` one or make a `small_clip`.

    `params`: a nested dict of float32 arrays, transformers' Flax layout. `sizes` names what the
    conditions' shapes leave to CLIP.
    """

    config: Any
    tokenizer: Any
    module: Any
    preprocess: Preprocess
    params: dict[str, Any]
    programs: tuple[Callable, Callable] = dataclasses.field(repr=False)

    @staticmethod
    def load(source) -> Clip:
        """Loads a CLIP from a directory, or from the hub by name (`openai/clip-vit-large-patch14`).

        Weights come from safetensors or msgpack. Raises ValueError, one line, where nothing is
        there, the hub cannot be reached, or files are missing, broken or of another model.
        """
        folder = find_clip(source)
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "clip":
            raise ValueError(f"{folder}: config.json is of a {kind!r} model; allowed: 'clip'")
        described = folder / "preprocessor_config.json"
        described = read_json(described) if described.is_file() else {}
        with _quiet() as transformers:
            try:
                config = transformers.CLIPConfig.from_pretrained(folder)
                tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
            except Exception as error:  # whatever a broken file makes of itself in there
                raise ValueError(f"{folder} is broken: {' '.join(str(error).split())}") from error
        preprocess = Preprocess.from_dict(described, config.vision_config.image_size)
        model = _model(config)
        params = jax.tree.map(jnp.asarray, read_weights(folder, model.params_shape_tree))
        return _clip(config, tokenizer, model.module, preprocess, params)

    def save(self, folder) -> None:
        """Writes a directory that `load`, `FlaxCLIPModel`, `CLIPModel`, `CLIPTokenizer` and
        `CLIPImageProcessor` load (`from_pretrained`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _quiet():
            self.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        described = json.dumps(self.preprocess.to_dict(), indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(described, encoding="utf-8")
        write_weights(folder, jax.device_get(self.params))

    @property
    def sizes(self) -> dict[str, int]:
        """text_length L, text_width D and embed_width E of what `text` and `image` return."""
        return {
            "text_length": self.config.text_config.max_position_embeddings,
            "text_width": self.config.text_config.hidden_size,
            "embed_width": self.config.projection_dim,
        }

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to token ids, int32 [B, L], padded; a longer text is cut and still ends in the end
        token. Raises ValueError where `texts` is not a sequence of str."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"a text must be a str, not {type(wrong[0]).__name__}")
        length = self.sizes["text_length"]
        if not texts:
            return np.zeros((0, length), np.int32)
        with _quiet():
            encoded = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=length
            )
        return np.asarray(encoded["input_ids"], np.int32)

    def text(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes B texts: "ids" int32 [B, L], "tokens" float32 [B, L, D] (last hidden states after
        the final norm, what Stable Diffusion conditions on), "vector" float32 [B, E], unit length.
        """
        ids_BxL = self.tokenize(texts)
        tokens_BxLxD, vector_BxE = _in_batches(partial(self.programs[0], self.params), ids_BxL)
        return {"ids": ids_BxL, "tokens": tokens_BxLxD, "vector": vector_BxE}

    def image(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Encodes B images, uint8 [B, H, W, 3] or a list of [H, W, 3] of any sizes: float32 [B, E]
        of unit length. Raises ValueError where an image is something else."""
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                raise ValueError(
                    f"CLIP takes uint8 images [H, W, 3], not {image.dtype} {list(image.shape)}"
                )
        empty = np.zeros((0, *self.preprocess.crop, 3), np.uint8)
        images = np.stack([self.preprocess.resize(i) for i in images]) if len(images) else empty
        return _in_batches(lambda part: (self.programs[1](self.params, part),), images)[0]

    def pixels(self, images: jax.Array) -> jax.Array:
        """uint8 [B, h, w, 3] at the model's size to the tower's normalised float32, in JAX."""
        mean = jnp.asarray(self.preprocess.mean, jnp.float32)[None, None, None]
        std = jnp.asarray(self.preprocess.std, jnp.float32)[None, None, None]
        return (images.astype(jnp.float32) / 255.0 - mean) / std

    def loss(self, params, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, dict]:
        """The contrastive loss of a batch of pairs, to be called under `jax.jit`.

        `params` as `self.params`; `images` uint8 [B, h, w, 3] at the model's size; `ids` int32
        [B, L] of `tokenize`. Returns what `contrastive_loss` does. Raises ValueError where the
        images have another size.
        """
        if images.shape[1:] != (*self.preprocess.crop, 3):
            raise ValueError(
                f"CLIP trains on images {[*self.preprocess.crop, 3]}, not {list(images.shape[1:])}"
            )
        image_BxE = _encode_image(self.module, self.pixels, params, images)
        text_BxE = _encode_text(self.module, params, ids)[1]
        return contrastive_loss(image_BxE, text_BxE, params["logit_scale"], ids)

    def with_params(self, params) -> Clip:
        """The same model with other parameters; compiled programs are shared."""
        return dataclasses.replace(self, params=params)


def contrastive_loss(image, text, logit_scale, ids) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric InfoNCE over a batch of pairs (arXiv 2103.00020, figure 3).

    `image`, `text`: float32 [B, E], unit length; `logit_scale`: log of the inverse temperature;
    `ids`: int32 [B, L]: pairs that share a text are not each other's negatives. Returns the mean
    loss and {"accuracy": top-1, mean of both directions, "temperature"}.
    """
    scale = jnp.minimum(jnp.exp(logit_scale), MAX_SCALE)
    logits_BxB = scale * (image @ text.T)
    same_BxB = jnp.all(ids[:, None] == ids[None, :], axis=-1)
    itself_BxB = jnp.eye(len(ids), dtype=bool)
    logits_BxB = jnp.where(same_BxB & ~itself_BxB, -jnp.inf, logits_BxB)

    def one_way(logits):
        loss = -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)))
        return loss, jnp.mean(jnp.argmax(logits, axis=-1) == jnp.arange(len(ids)))

    (to_text, hits_text), (to_image, hits_image) = one_way(logits_BxB), one_way(logits_BxB.T)
    metrics = {"accuracy": (hits_text + hits_image) / 2, "temperature": 1.0 / scale}
    return (to_text + to_image) / 2, metrics


def small_clip(captions: Iterable[str], *, image_size: int = 64, seed: int = 0) -> Clip:
    """A small CLIP with random weights (about 2 M) and a vocabulary learnt from `captions`.

    Texts of up to 48 tokens; images of `image_size`, a multiple of 8. Deterministic in captions
    and seed. Raises ValueError for another image size.
    """
    if image_size < 8 or image_size % 8:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size, 8")
    vocabulary, merges = build_vocabulary(captions)
    special = {
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
    }
    text = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "vocab_size": len(vocabulary),
        "projection_dim": 128,
    }
    vision = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "patch_size": 8,
        "image_size": image_size,
        "projection_dim": 128,
    }
    with _quiet() as transformers, tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
        files[1].write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        tokenizer = transformers.CLIPTokenizer(*map(str, files), model_max_length=48)
        config = transformers.CLIPConfig(
            text_config=text | special, vision_config=vision, projection_dim=128
        )
    config.architectures = ["CLIPModel"]
    model = _model(config)
    with _quiet(), jax.debug_key_reuse(False):
        params = jax.jit(lambda key: model.init_weights(key, model.input_shape))(
            jax.random.PRNGKey(seed)
        )
    return _clip(config, tokenizer, model.module, Preprocess(image_size, (image_size,) * 2), params)


def _clip(config, tokenizer, module, preprocess: Preprocess, params) -> Clip:
    clip = Clip(config, tokenizer, module, preprocess, dict(params), programs=())
    programs = (
        jax.jit(partial(_encode_text, module)),
        jax.jit(partial(_encode_image, module, clip.pixels)),
    )
    return dataclasses.replace(clip, programs=programs)


def _model(config):
    with _quiet() as transformers, jax.debug_key_reuse(False):
        return transformers.FlaxCLIPModel(config, _do_init=False)


def _encode_text(module, params, ids_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    # No attention mask, as in Stable Diffusion: attention is causal, so that what comes after the
    # end token never reaches it, and the vector is the same with a mask and without.
    def towers(module, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        out = module.text_model(ids, jnp.ones_like(ids), positions)
        return out.last_hidden_state, module.text_projection(out.pooler_output)

    with jax.numpy_rank_promotion("allow"):
        tokens_BxLxD, vector_BxE = module.apply({"params": params}, ids_BxL, method=towers)
    return tokens_BxLxD, _unit(vector_BxE)


def _encode_image(module, pixels, params, images_BxHxWx3: jax.Array) -> jax.Array:
    def tower(module, pixels):
        return module.visual_projection(module.vision_model(pixels).pooler_output)

    with jax.numpy_rank_promotion("allow"):
        return _unit(module.apply({"params": params}, pixels(images_BxHxWx3), method=tower))


def _unit(vector_BxE: jax.Array) -> jax.Array:
    length_Bx1 = jnp.linalg.norm(vector_BxE, axis=-1, keepdims=True)
    return vector_BxE / jnp.maximum(length_Bx1, 1e-12)


def _in_batches(program, inputs: np.ndarray) -> list[np.ndarray]:
    """Runs a program over [B, ...] in batches of the sizes in BATCHES, padded with the last row."""
    results, start = [], 0
    while start < len(inputs):
        rest = len(inputs) - start
        size = max(size for size in BATCHES if size < 2 * rest)
        part = inputs[start : start + size]
        padding = [(0, size - len(part))] + [(0, 0)] * (inputs.ndim - 1)
        outputs = program(np.pad(part, padding, mode="edge"))
        results.append([np.asarray(output)[: len(part)] for output in outputs])
        start += len(part)
    if not results:
        shapes = jax.eval_shape(program, jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype))
        return [np.zeros((0, *shape.shape[1:]), shape.dtype) for shape in shapes]
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


@contextlib.contextmanager
def _quiet():
    """transformers, without its notices (that Flax classes end with its version 4, and others)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield transformers
        finally:
            logging.set_verbosity(before)
