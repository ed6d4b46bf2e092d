"""Where training starts from: a trained composer, or a trained UNet that one is built around.

With only a caption given, a composer around a UNet is that UNet: `conv_in` grows input channels of
zeros for local conditions, the new projections into timestep embedding and tokens start at zero,
and the tokens of absent conditions are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from composer_jax.diffusion.process import MEANING
from composer_jax.models.composer import ComposerConfig
from composer_jax.models.files import Tensor, dotted, open_tensors, read_json, values_of
from composer_jax.models.pretrained import Pretrained


def around(unet: Pretrained, config: ComposerConfig) -> dict[str, Tensor]:
    """The tensors of a composer that come from `unet`, by their names in the composer, unread.

    Raises ValueError where the config's UNet is another one, or where CLIP's words are of another
    width than the context that the UNet was trained with.
    """
    local = config.local_channels
    wanted = replace(unet.config, in_channels=unet.config.in_channels + local)
    for key, value in wanted.to_dict().items():
        if config.unet.to_dict()[key] != value:
            raise ValueError(
                f"model.unet.{key} is {config.unet.to_dict()[key]}; {unet.where} with "
                f"{local} local channels asks for {value}"
            )
    for name in config.conditions:
        for part in config.token_parts(name).values():
            width = config.unet.cross_attention_dim
            if part.kind == "tokens" and part.shape[-1] != width:
                raise ValueError(
                    f"{name} brings words of width {part.shape[-1]}, {unet.where} was trained with "
                    f"{width}; name the CLIP that it was trained with"
                )
    tensors = {f"unet.{name}": tensor for name, tensor in unet.tensors.items()}
    kernel, fold = tensors["unet.conv_in.kernel"], unet.config.patch**2

    def grown(array: np.ndarray) -> np.ndarray:
        folded = array.reshape(*array.shape[:2], fold, -1, array.shape[3])
        padded = np.pad(folded, [(0, 0)] * 3 + [(0, local), (0, 0)])
        return padded.reshape(*array.shape[:2], -1, array.shape[3])

    return {**tensors, "unet.conv_in.kernel": kernel.apply(grown)}


def going_on(
    folder: Path, config: ComposerConfig
) -> tuple[dict[str, Tensor], dict[str, Any], Sequence[str]]:
    """A trained composer's tensors, unread, what of a process they are bound to, and the conditions
    that they know.

    `folder`: a model directory. Conditions that `config` does not have are left out. Raises
    ValueError where the two differ in anything else but how much context there may be.
    """
    info = read_json(folder / "model.json")
    with values_of(folder / "model.json"):
        trained, known = dict(info["composer"]), info["composer"]["conditions"]
        trained = {**trained.pop("unet"), **trained}
        process = {key: info["process"][key] for key in MEANING if key in info["process"]}
    asked = config.to_dict()
    asked = {**asked.pop("unet"), **asked}
    for key in sorted(asked.keys() - {"conditions", "context_length"}):
        if trained.get(key) != asked[key]:
            raise ValueError(f"{key} is {asked[key]}; {folder} was trained with {trained.get(key)}")
    gone = tuple(f"{name}_" for name in known if name not in config.conditions)
    tensors = {
        name: tensor
        for name, tensor in open_tensors(folder / "unet.safetensors").items()
        if not name.startswith("absent.") and not name.split(".")[1].startswith(gone)
    }
    return tensors, process, known


def start_from(params, tensors: dict[str, Tensor]) -> Any:
    """Parameters with `tensors`, unread, in the places of those that have their names.

    Raises ValueError for a name or shape that the parameters do not have.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    named = {dotted(path): leaf for path, leaf in flat}
    for name, tensor in tensors.items():
        shape = named[name].shape if name in named else None
        if shape != tensor.shape:
            raise ValueError(f"the start has {name} {list(tensor.shape)}; the model {shape}")
        named[name] = tensor.cast(named[name].dtype)
    return jax.tree.unflatten(tree, named.values())
