"""The fixed networks that examples are taken apart by: codec, CLIP, detectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax import conditions
from composer_jax.data.prepare import CHUNK, Encoders, available, fingerprint, remembered
from composer_jax.data.sources import Source
from composer_jax.data.stream import Caches
from composer_jax.data.tools import load_tools
from composer_jax.models.clip import Clip
from composer_jax.models.vae import VAE
from composer_jax.storage.models import clip_source, load_codec

log = logging.getLogger("composer_jax")


@dataclass(frozen=True)
class Extractors:
    """`tools` by name, CLIP among them; `encoders` for what is no condition; `made_by`: hashes."""

    vae: VAE
    clip: Clip
    clip_text: Mapping[str, Any]
    tools: Mapping[str, Any]
    encoders: Encoders
    made_by: Mapping[str, Any]

    def conditions(
        self, wanted: Sequence[str], source: Source | Caches, pools: Path | None = None
    ) -> tuple[str, ...]:
        """Those that are wanted, or, where that is empty, all that this source can give or holds;
        what it can give is asked once, and kept in `pools`, if there are any.

        Raises ValueError for an unknown one, or one that is wanted and cannot be given; else what
        is left out is named in the log.
        """
        if isinstance(source, Caches):
            wanted = wanted or source.conditions
            for name in wanted:
                conditions.get(name)
            return tuple(wanted)
        names = tuple(wanted or conditions.names())
        code = conditions.fingerprint(names)
        key = ["available", source.key, len(source), source.size, self.made_by, names, code]
        reasons = remembered(pools, key, lambda: available(source, self.tools, names))
        self.clip.cut.clear()  # of examples that are taken apart again
        for name, reason in reasons.items():
            if reason and wanted:
                raise ValueError(f"{source.name} cannot give {name}: {reason}")
            if reason:
                log.warning("goes without %s: %s", name, reason)
        return tuple(name for name, reason in reasons.items() if reason is None)

    def absent(self, names: Sequence[str], pools: Path) -> dict[str, dict[str, np.ndarray]]:
        """`absent_values`, encoded once and kept in `pools`."""

        def encode() -> dict:
            return jax.tree.map(np.ndarray.tolist, absent_values(names, self.tools))

        code = conditions.fingerprint(names)
        kept = remembered(pools, ["absent", self.made_by, names, code], encode)
        return {
            name: {part: np.asarray(value, np.float32) for part, value in parts.items()}
            for name, parts in kept.items()
        }


def absent_values(
    names: Sequence[str], tools: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Values of the conditions whose absence is encoded, float32, one example each."""
    values = {}
    for name in names:
        condition = conditions.get(name)
        stored = condition.absent(tools.get(condition.tool))
        if stored is not None:
            values[name] = jax.tree.map(np.asarray, condition.value(stored))
    return values


def load_extractors(config) -> Extractors:
    """What a config names: `codec`, `clip`, `clip_text`, `tools`, `image_size`.

    Raises ValueError where one cannot be had or the image size does not fit the codec.
    """
    vae = load_codec(config.codec)
    clip_text = {"skip": config.clip_text.skip, "pad": config.clip_text.pad or None}
    clip = Clip.load(clip_source(config.clip), **clip_text)
    if config.image_size % vae.factor:
        raise ValueError(
            f"image size {config.image_size} is not a multiple of the codec's {vae.factor}"
        )
    encode = nnx.jit(lambda vae, images: vae.encode(images.astype(jnp.float32) / 127.5 - 1.0))

    def moments(images: np.ndarray, given) -> np.ndarray:
        del given
        padded = np.concatenate([images, images[:1].repeat(-len(images) % CHUNK, axis=0)])
        return np.asarray(encode(vae, jnp.asarray(padded)))[: len(images)].astype(np.float16)

    made_by = {
        "vae": fingerprint(nnx.state(vae)),
        "clip": fingerprint(clip.params),
        "clip_text": clip_text,
        "tokenizer": clip.tokenizer.fingerprint(),
        "tools": config.tools.to_dict(),
    }
    tools = {"clip": clip, **load_tools(**config.tools)}
    return Extractors(vae, clip, clip_text, tools, {"moments": moments}, made_by)
