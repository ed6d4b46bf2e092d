"""A composer to which nothing but a caption is given, as the text-to-image UNet that it then is.

Absent maps add nothing to the input, so `conv_in` keeps the latent's channels alone; absent vectors
add nothing to the timestep embedding and their tokens are not seen. The caption's words are context
as in Stable Diffusion. Its sentence vector joins the timestep embedding, which a text-to-image UNet
has no input for: such a composer is one only as long as that projection gives a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from composer_jax.diffusion.process import Process
from composer_jax.models.composer import ComposerConfig
from composer_jax.models.files import FORMAT, Tensor, open_tensors, read_json, values_of
from composer_jax.models.pretrained import KINDS, Pretrained

CAPTION, WORDS = "caption", "caption_tokens"


class NoCounterpart(ValueError):
    """A composer that no pipeline of diffusers computes, with the reason."""


def open_caption_unet(folder: Path) -> tuple[Pretrained, Mapping[str, Tensor], tuple[str, ...]]:
    """The UNet of a model directory's composer for captions alone, unread; the projection that the
    words go through ("kernel", "bias"), {} for none; and the conditions that are left out.

    Raises ValueError, one line, where the composer is something else with its caption alone.
    """
    info, path = read_json(folder / "model.json"), folder / "unet.safetensors"
    if info.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {info.get('format')}; this version reads {FORMAT}")
    with values_of(folder / "model.json"):
        config = ComposerConfig.from_dict(info["composer"])
        about = {"process": dict(info["process"]), "sampler": dict(info.get("sampler", {}))}
        Process.from_dict(about["process"])  # what is no process is said here
    latent = config.unet.in_channels - config.local_channels
    if CAPTION not in config.conditions or CAPTION not in info.get("absent", {}):
        raise NoCounterpart(
            f"{folder} is a composer without a caption; a text-to-image UNet needs one"
        )
    if config.unet.patch != 1:
        raise NoCounterpart(
            f"a UNet with patch {config.unet.patch} has no counterpart in diffusers"
        )
    every = open_tensors(path)
    tensors = {n.removeprefix("unet."): t for n, t in every.items() if n.startswith("unet.")}
    kernel = tensors["conv_in.kernel"]
    tensors["conv_in.kernel"] = kernel.apply(lambda array: array[:, :, :latent])
    if CAPTION in config.embedded:
        constant = _constant(every, folder)
        name = "time_embedding.linear_2.bias"
        tensors[name] = _sum(tensors[name], constant)
    words = {key: every[f"tokens.{WORDS}.{key}"] for key in ("kernel", "bias")
             if f"tokens.{WORDS}.{key}" in every}  # fmt: skip
    unet = replace(config.unet, in_channels=latent)
    others = tuple(name for name in config.conditions if name != CAPTION)
    return Pretrained(KINDS["unet"], unet, tensors, str(path), **about), words, others


def _constant(tensors: Mapping[str, Tensor], folder: Path) -> Tensor:
    """What the caption's vector adds to the timestep embedding, whatever the vector."""
    last = "embeddings.caption_vector.linear_2"
    if np.any(tensors[f"{last}.kernel"].read()):
        raise NoCounterpart(
            f"{folder}: the caption's sentence vector joins the timestep embedding, for which "
            "diffusers' Stable Diffusion has no input; a composer with model.vectors=tokens "
            "goes there (--only unet and --only vae take its networks)"
        )
    return tensors[f"{last}.bias"]


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return Tensor(a.shape, a.dtype, lambda: a.read() + b.read().astype(a.dtype))
