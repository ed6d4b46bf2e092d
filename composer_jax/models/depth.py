"""What happens to images before a depth network, as transformers' DPTImageProcessor does it, and
to depth after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from composer_jax.models.resample import resample
from composer_jax.models.vae import strict

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 8  # images in the network at a time; fewer are padded to a power of two
MAX_PIXELS = 2**21  # of a resized image
MOST = 2**16  # what every number of a config stays below
NEAREST = 1e-3  # of the largest distance: what a metric network's map is clipped to from below


@dataclass(frozen=True)
class Preprocess:
    """Resizing and normalising of images; the defaults are Depth Anything V2's.

    `size`: height and width to come near to. `keep_aspect_ratio`: the side that needs less
    scaling is fitted, the other one follows. Both are rounded to multiples of `multiple`.
    `resample`: Pillow's filter. Pixels times `rescale`, less `mean`, over `std`.
    """

    size: tuple[int, int] = (518, 518)
    keep_aspect_ratio: bool = True
    multiple: int = 14
    resample: int = int(Image.Resampling.BICUBIC)
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        check_types(self, zero=("mean", "resample"))
        if len(self.size) != 2 or len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"Preprocess: size has 2, mean and std have 3 numbers; "
                f"given {self.size}, {self.mean}, {self.std}"
            )
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"Preprocess: resample {self.resample} is no filter of Pillow's")

    def to_dict(self) -> dict:
        """As JSON's types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> Preprocess:
        """From `to_dict`'s result; raises ValueError for an unknown key or a wrong value."""
        return cls(**strict(cls, values))

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of `height` x `width` is resized to.

        Raises ValueError where that is too large: a ribbon.
        """
        y, x = self.size[0] / height, self.size[1] / width
        if self.keep_aspect_ratio:
            y = x = x if abs(1 - x) < abs(1 - y) else y
        found = tuple(
            max(1, round(scale * side / self.multiple)) * self.multiple
            for scale, side in ((y, height), (x, width))
        )
        if math.prod(found) > MAX_PIXELS:
            raise ValueError(
                f"an image of {width} x {height} pixels is too long for the depth network: it "
                f"would be {found[1]} x {found[0]} there; cut it into pieces"
            )
        return found

    def resize(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to uint8 [B, h, w, 3], (h, w) of `shape`."""
        size = self.shape(*images.shape[1:3])[::-1]
        return np.stack(
            [np.asarray(Image.fromarray(image).resize(size, self.resample)) for image in images]
        )

    def normalise(self, images) -> jax.Array:
        """uint8 [B, h, w, 3] to the network's float32."""
        mean, std = (np.reshape(v, (1, 1, 1, 3)).astype(np.float32) for v in (self.mean, self.std))
        return (jnp.asarray(images, jnp.float32) * np.float32(self.rescale) - mean) / std


def depth_tool(
    network: nnx.Module, preprocess: Preprocess, max_depth: float | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """The depth network that the condition `depth` takes: uint8 [B, H, W, 3] to float32 [B, H, W],
    relative inverse depth, near = large.

    `network` maps what `preprocess` makes of images to [B, h, w]; its result is brought back to
    the images' size (bicubic). `max_depth`: the network gives distances up to this instead, and
    they are inverted. Compiled once per image shape and padded batch size. Raises ValueError for
    images of another kind.
    """
    graph, state = nnx.split(network)

    @partial(jax.jit, static_argnames="shape")
    def run(state, images, shape):
        depth_Bxhxw = nnx.merge(graph, state)(preprocess.normalise(images)).astype(jnp.float32)
        depth_BxHxW = resample(depth_Bxhxw[..., None], shape, "bicubic")[..., 0]
        if max_depth is None:
            return depth_BxHxW
        return 1 / jnp.maximum(depth_BxHxW, NEAREST * max_depth)

    def tool(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"a depth network takes images uint8 [B, H, W, 3], not {found}")
        maps = []
        for start in range(0, len(images), BATCH):
            small = preprocess.resize(images[start : start + BATCH])
            room = (1 << (len(small) - 1).bit_length()) - len(small)
            padded = np.pad(small, ((0, room), (0, 0), (0, 0), (0, 0)))
            maps.append(np.asarray(run(state, padded, shape=images.shape[1:3]))[: len(small)])
        return np.concatenate(maps)

    return tool


def check_types(config, zero: tuple[str, ...] = ()) -> None:
    """Raises ValueError where a data class's value is not of its default's kind.

    Numbers must be positive and below 2^16; those of the fields named in `zero` may be 0.
    """
    for field in fields(config):
        value, name = getattr(config, field.name), f"{type(config).__name__}: {field.name}"
        check_type(name, value, field.default, field.name in zero)


def check_type(name: str, value, like, zero: bool = False) -> None:
    """Raises ValueError where `value` is not of the kind of `like`; `name` is for the message."""
    if isinstance(like, tuple | list):
        if not isinstance(value, tuple | list) or not value:
            raise ValueError(f"{name} is {value!r}, not a list")
        for one in value:
            check_type(name, one, like[0], zero)
        return
    if isinstance(like, bool):
        right, text = isinstance(value, bool), "true or false"
    elif isinstance(like, str):
        right, text = isinstance(value, str), "a text"
    elif isinstance(like, int | float):
        kind, text = (int, "a whole number") if isinstance(like, int) else (int | float, "a number")
        right = isinstance(value, kind) and not isinstance(value, bool)
        right = right and (value >= 0 if zero else value > 0) and value < MOST
        text += f" {'of 0 or more' if zero else 'above 0'} and below {MOST}"
    else:
        right, text = isinstance(value, type(like)), f"a {type(like).__name__}"
    if not right:
        raise ValueError(f"{name} is {value!r}, not {text}")
