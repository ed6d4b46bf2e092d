"""CLIP (arXiv 2103.00020): text and images to embeddings, by transformers' network or our own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.models.bpe import END, START, build_vocabulary
from composer_jax.models.clip_files import (
    PREPROCESSORS,
    Preprocess,
    find_clip,
    open_params,
    read_params,
    write_params,
)
from composer_jax.models.clip_nnx import CLIPConfig, abstract_clip, random_params
from composer_jax.models.clip_tokenizer import CutTexts, Tokenizer
from composer_jax.models.clip_towers import (
    Towers,
    encode_image,
    encode_text,
    flax_towers,
    nnx_towers,
)
from composer_jax.models.files import Tensor, module_tensors, read_json
from composer_jax.utils.atomic import write_json
from composer_jax.utils.owned import replaced_folder

log = logging.getLogger("composer_jax")

BATCHES = (1, 8, 64)  # the only batch sizes that are ever compiled
BACKENDS = ("flax", "nnx")
MAX_SCALE = 100.0  # CLIP's bound on the inverse temperature


class Programs(NamedTuple):
    """Two towers; jitted, `encode_text` and `encode_image` by them, of parameters and inputs."""

    towers: Towers
    text: Callable
    image: Callable


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A text tower and an image tower that agree; `load` one or make a `small_clip`.

    `params`: a nested dict of float32 arrays, transformers' Flax layout, whatever the backend.
    `config` is transformers'; `pad` is the id that fills up a text; `cut` counts texts too long.
    """

    config: Any
    tokenizer: Tokenizer
    programs: Programs = dataclasses.field(repr=False)
    preprocess: Preprocess
    params: dict[str, Any]
    pad: int
    cut: CutTexts = dataclasses.field(default_factory=CutTexts, repr=False)

    @staticmethod
    def load(source, *, backend: str | None = None, skip: int = 0, pad: str | None = None) -> Clip:
        """Loads a CLIP from a directory, or from the hub by name (`openai/clip-vit-large-patch14`).

        `backend`: "flax" (transformers 4) or "nnx" (our own); None takes flax where it is there.
        `skip`: how many layers before the last the word tokens come from; Stable Diffusion 2 takes
        1. `pad`: the token that fills up a text; None is the directory's own.

        Weights come from safetensors or msgpack. Raises ValueError, one line, where nothing is
        there, the hub cannot be reached, or files are missing, broken or of another model.
        """
        folder = find_clip(source)
        config, checked = _read_config(folder)
        tokenizer = _read_tokenizer(folder, checked)
        network = abstract_clip(checked)
        preprocess = Preprocess.load(folder, checked.vision.image_size)
        programs = _programs(config, backend, skip, preprocess)
        params = read_params(folder, module_tensors(network))
        backend = programs.towers.backend
        whose = {"flax": "transformers' FlaxCLIPModel", "nnx": "our own network"}[backend]
        log.info("CLIP %s runs by %s", source, whose)
        return _clip(config, tokenizer, programs, preprocess, params, pad)

    def save(self, folder) -> None:
        """Writes a directory that `load`, `FlaxCLIPModel`, `CLIPModel`, `CLIPTokenizer` and
        `CLIPImageProcessor` load (`from_pretrained`), of transformers 4 and 5.

        It takes the place of an older one in one move; what others wrote there stays. Raises
        `WriteError` where the system refuses.
        """
        with replaced_folder(Path(folder), keep=True) as new:
            with _quiet():
                self.config.save_pretrained(new)
            self.tokenizer.save(new, self.sizes["text_length"])
            write_json(new / "preprocessor_config.json", self.preprocess.to_dict())
            write_params(new, self.params)

    @property
    def backend(self) -> str:
        """Whose network runs: "flax", transformers', or "nnx", our own."""
        return self.programs.towers.backend

    @property
    def sizes(self) -> dict[str, int]:
        """text_length L, text_width D and embed_width E of what `text` and `image` return: what
        the conditions' shapes leave to CLIP."""
        return {
            "text_length": self.config.text_config.max_position_embeddings,
            "text_width": self.config.text_config.hidden_size,
            "embed_width": self.config.projection_dim,
        }

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to token ids, int32 [B, L], padded; a longer text is cut and still ends in the end
        token (`report_cut` says so). Raises ValueError where `texts` is not a sequence of str."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"a text must be a str, not {type(wrong[0]).__name__}")
        length = self.sizes["text_length"]
        if not texts:
            return np.zeros((0, length), np.int32)
        rows, left = self.tokenizer.encode(texts, length)
        self.cut.add(texts, left)
        ids_BxL = np.full((len(texts), length), self.pad, np.int32)
        for ids_L, row in zip(ids_BxL, rows, strict=True):
            ids_L[: len(row)] = row
        return ids_BxL

    def report_cut(self) -> None:
        """Logs in one line how many texts were cut since it was last called, and an example."""
        if message := self.cut.message(self.sizes["text_length"]):
            log.warning(message)
        self.cut.clear()

    def text(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes B texts: "ids" int32 [B, L], "tokens" float32 [B, L, D] (hidden states of the
        last layer, or `skip` layers before, after the final norm: what Stable Diffusion conditions
        on), "vector" float32 [B, E], unit length."""
        ids_BxL = self.tokenize(texts)
        tokens_BxLxD, vector_BxE = _in_batches(partial(self.programs.text, self.params), ids_BxL)
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
        return _in_batches(lambda part: (self.programs.image(self.params, part),), images)[0]

    def loss(self, params, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, dict]:
        """The contrastive loss of a batch of pairs, to be called under `jax.jit`.

        `params` as `self.params`; `images` uint8 [B, h, w, 3] at the model's size; `ids` int32
        [B + N, L] of `tokenize`, those of N false texts last. Returns what `contrastive_loss`
        does. Raises ValueError where the images have another size.
        """
        if images.shape[1:] != (*self.preprocess.crop, 3):
            raise ValueError(
                f"CLIP trains on images {[*self.preprocess.crop, 3]}, not {list(images.shape[1:])}"
            )
        towers = self.programs.towers
        image_BxE = encode_image(towers, self.preprocess.pixels, params, images)
        text_BxE = encode_text(towers, params, ids)[1]
        return contrastive_loss(image_BxE, text_BxE, params["logit_scale"], ids)

    def with_params(self, params) -> Clip:
        """The same model with other parameters; compiled programs are shared."""
        return dataclasses.replace(self, params=params)


def open_clip(source) -> tuple[dict[str, Tensor], Callable[[Path], None]]:
    """A CLIP's parameters under our names, unread, and what writes its other files into a folder;
    `source` as `Clip.load`.

    Raises ValueError, one line, as `Clip.load` does.
    """
    folder = find_clip(source)
    checked = _read_config(folder)[1]
    tokenizer = _read_tokenizer(folder, checked)

    def write(target: Path) -> None:
        for name in ("config.json", *PREPROCESSORS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        tokenizer.save(target, checked.text.max_position_embeddings)

    return open_params(folder, module_tensors(abstract_clip(checked))), write


def open_text_encoder(
    source, *, skip: int = 0, pad: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], Callable[[Path], None]]:
    """The text tower alone, as diffusers' pipelines take it: its config.json, its parameters under
    our names, unread, and what writes its tokenizer. `skip`, `pad` as `Clip.load`; layers that are
    skipped are left out.

    Raises ValueError, one line, as `Clip.load` does.
    """
    folder = find_clip(source)
    config, checked = _read_config(folder)
    layers, tokenizer = checked.text.num_hidden_layers - skip, _read_tokenizer(folder, checked)
    if pad is not None:
        tokenizer = dataclasses.replace(tokenizer, special={**tokenizer.special, "pad_token": pad})
    every = open_params(folder, module_tensors(abstract_clip(checked)))
    layer = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
    tensors = {
        name: tensor
        for name, tensor in every.items()
        if name.startswith("text_model.")
        and not ((found := layer.match(name)) and int(found[1]) >= layers)
    }
    values = config.text_config.to_dict() | {"num_hidden_layers": layers}
    values |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    length = checked.text.max_position_embeddings
    return values, tensors, lambda target: tokenizer.save(target, length)


def _read_config(folder: Path) -> tuple[Any, CLIPConfig]:
    """transformers' config, and ours."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{folder}: config.json is of a {kind!r} model; allowed: 'clip'")
    with _quiet() as transformers:
        try:
            config = transformers.CLIPConfig.from_pretrained(folder)
            return config, CLIPConfig.from_dict(config.to_dict())
        except Exception as error:  # whatever a broken file makes of itself in there
            raise ValueError(f"{folder} is broken: {' '.join(str(error).split())}") from error


def contrastive_loss(image, text, logit_scale, ids) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric InfoNCE over a batch of pairs (arXiv 2103.00020, figure 3).

    `image` [B, E], `text` [B + N, E]: float32, unit length; the last N texts belong to no image
    (arXiv 2210.01936); `logit_scale`: log of the inverse temperature; `ids`: int32 [B + N, L]:
    pairs that share a text are not each other's negatives. Returns the loss of each pair [B] and,
    of each, {"accuracy": top-1, mean of both directions, "temperature"}.
    """
    scale, count = jnp.minimum(jnp.exp(logit_scale), MAX_SCALE), len(image)
    logits_BxT = scale * (image @ text.T)
    same_BxT = jnp.all(ids[:count, None] == ids[None, :], axis=-1)
    itself_BxT = jnp.eye(count, len(ids), dtype=bool)
    logits_BxT = jnp.where(same_BxT & ~itself_BxT, -jnp.inf, logits_BxT)

    def one_way(logits):
        loss = -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1))
        return loss, jnp.argmax(logits, axis=-1) == jnp.arange(count)

    (to_text, hits_text) = one_way(logits_BxT)
    (to_image, hits_image) = one_way(logits_BxT[:, :count].T)
    temperature = jnp.broadcast_to(1.0 / scale, count)
    accuracy = jnp.mean(jnp.stack([hits_text, hits_image]), axis=0, dtype=jnp.float32)
    metrics = {"accuracy": accuracy, "temperature": temperature}
    return (to_text + to_image) / 2, metrics


def small_clip(
    captions: Iterable[str], *, image_size: int = 64, seed: int = 0, backend: str | None = None
) -> Clip:
    """A small CLIP with random weights (about 2 M) and a vocabulary learnt from `captions`.

    Texts of up to 48 tokens; images of `image_size`, a multiple of 8. Deterministic in captions
    and seed, whatever the backend (see `Clip.load`). Raises ValueError for another image size.
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
    with _quiet() as transformers:
        config = transformers.CLIPConfig(
            text_config=text | special, vision_config=vision, projection_dim=128
        )
    config.architectures = ["CLIPModel"]
    network = abstract_clip(CLIPConfig.from_dict(config.to_dict()))
    params = random_params(network, config.logit_scale_init_value, seed)
    preprocess = Preprocess(image_size, (image_size,) * 2)
    programs = _programs(config, backend, 0, preprocess)
    return _clip(config, Tokenizer(vocabulary, merges), programs, preprocess, params)


def _clip(config, tokenizer: Tokenizer, programs: Programs, preprocess, params, pad=None) -> Clip:
    pad = tokenizer.special["pad_token"] if pad is None else pad
    number = tokenizer.id(pad)
    if number is None:
        raise ValueError(f"the padding token {pad!r} is not in CLIP's vocabulary")
    return Clip(config, tokenizer, programs, preprocess, dict(params), number)


def _read_tokenizer(folder: Path, config: CLIPConfig) -> Tokenizer:
    """A directory's tokenizer; raises ValueError, one line, where it is broken or another
    model's."""
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer.largest >= config.text.vocab_size:
            raise ValueError(
                f"its tokenizer has an id {tokenizer.largest}, its model "
                f"{config.text.vocab_size} tokens"
            )
        end = config.text.eos_token_id
        if end not in (2, tokenizer.end):  # 2: of the first releases, see TextTower
            raise ValueError(
                f"config.json ends a text with token {end}, its tokenizer with {tokenizer.end}"
            )
    except Exception as error:  # whatever a broken file makes of itself in there
        raise ValueError(f"{folder} is broken: {' '.join(str(error).split())}") from error
    return tokenizer


def _programs(config, backend: str | None, skip: int, preprocess: Preprocess) -> Programs:
    """What runs a CLIP of transformers' config; what is loaded twice is compiled once."""
    layers = config.text_config.num_hidden_layers
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < layers:
        raise ValueError(f"skip is {skip!r}; this CLIP has {layers} layers, 0 to {layers - 1} go")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    known = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    described = json.dumps(known, sort_keys=True, default=str)
    return _jitted(described, backend, skip, preprocess)


@functools.lru_cache(maxsize=8)
def _jitted(described: str, backend: str | None, skip: int, preprocess: Preprocess) -> Programs:
    towers = _towers(json.loads(described), backend, skip)
    text, image = partial(encode_text, towers), partial(encode_image, towers, preprocess.pixels)
    return Programs(towers, jax.jit(text), jax.jit(image))


def _towers(described: dict, backend: str | None, skip: int) -> Towers:
    if backend != "nnx":
        try:
            with _quiet() as transformers:
                config = transformers.CLIPConfig.from_dict(described)
                return flax_towers(transformers.FlaxCLIPModel.module_class(config), skip)
        except Exception as error:  # its absence has many forms, from version to version
            if backend == "flax":
                raise ValueError(
                    "backend 'flax' needs transformers 4 and a jax that it knows; here is 'nnx'"
                ) from error
    return nnx_towers(abstract_clip(CLIPConfig.from_dict(described)), skip)


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
    """transformers, without its notices (that Flax classes end, that PyTorch is not there, ...)."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            import transformers

            yield transformers
        finally:
            logging.disable(before)
