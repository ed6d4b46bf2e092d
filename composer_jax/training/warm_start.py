"""A composer built around a trained UNet: with only a caption given it is that UNet.

`conv_in` grows input channels of zeros for local conditions, the new projections into timestep
embedding and tokens start at zero, and the tokens of absent conditions are masked.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.models.composer import ComposerConfig
from composer_jax.models.files import Tensor
from composer_jax.models.pretrained import Pretrained
from composer_jax.training.sharding import dotted
from composer_jax.training.state import TrainState


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


def start_from(state: TrainState, tensors: dict[str, Tensor]) -> TrainState:
    """A new state whose parameters, and their average, hold `tensors` where these have the name.

    Each tensor is read once and goes to where its parameter lies. Raises ValueError for a name or
    shape that the parameters do not have.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(state.params)
    shapes = {dotted(path): leaf.shape for path, leaf in flat}
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            raise ValueError(
                f"the start has {name} {list(tensor.shape)}; the model {shapes.get(name)}"
            )

    def placed(name: str, leaf: jax.Array) -> jax.Array:
        if name not in tensors:
            return leaf
        array = tensors[name].read().astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    params = jax.tree.unflatten(tree, [placed(dotted(path), leaf) for path, leaf in flat])
    return replace(state, params=params, ema=jax.tree.map(jnp.copy, params))
