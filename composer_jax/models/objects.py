"""A small network that sees the solids of the built-in world: where each is, and what it is.

Every pixel says what it belongs to (nothing, or a shape), where the middle of that object is, and
the object's other attributes; pixels that vote for one place are one object (as in arXiv
1911.10194, without its heat map).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from composer_jax.models.detectors import Dense
from composer_jax.models.vae import strict

NUMBERS = 4  # of an object: its middle (y, x) from the pixel, its screen x, its distance
RADIUS, LEAST = 0.1, 16  # of votes around a middle, in image sides; pixels of an object at 64 px
FAR = 10.0  # what distances are divided by
SOLID = 0.124  # the share of pixels that are an object's, over 4,096 scenes


@dataclass(frozen=True)
class ObjectConfig:
    """What an object detector tells apart. `widths`: as in `Dense`."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    widths: tuple[int, int] = (64, 104)
    norm_num_groups: int = 8

    @property
    def splits(self) -> list[int]:
        """Where a pixel's outputs end: shape (nothing first), colour, size; numbers follow."""
        return list(np.cumsum([1 + len(self.shapes), len(self.colours), len(self.sizes)]))

    def to_dict(self) -> dict:
        """As JSON's types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> ObjectConfig:
        """From `to_dict`'s result; raises ValueError for an unknown key."""
        return cls(**strict(cls, values))


@dataclass(frozen=True)
class Thing:
    """One object that was seen. `x`: on the screen, -1 (left) to 1; `distance` from the camera;
    `certainty`: the probability of its shape."""

    shape: str
    colour: str
    size: str
    x: float
    distance: float
    certainty: float = 1.0


class ObjectDetector(Dense):
    """Shape, colour, size, middle and place of the object that each pixel belongs to."""

    def __init__(self, config: ObjectConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        outputs = config.splits[-1] + NUMBERS
        super().__init__(config.widths, config.norm_num_groups, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b H W 3"]) -> tuple[jax.Array, ...]:
        """images [B, H, W, 3] in [-1, 1], H and W multiples of 8.

        Returns logits of shape [B, H, W, 1 + s], colour and size, and numbers [B, H, W, 4].
        """
        return tuple(jnp.split(self.dense(images), self.config.splits, axis=-1))

    def look(self) -> Callable[[np.ndarray], list[tuple[np.ndarray, list[Thing]]]]:
        """A function of images uint8 [B, H, W, 3]: for each, ids [H, W] (0: no object) and what
        the objects 1, 2, ... are."""
        graph, state = nnx.split(self)
        run = jax.jit(lambda state, images: nnx.merge(graph, state)(images / 127.5 - 1.0))

        def look(images: np.ndarray) -> list[tuple[np.ndarray, list[Thing]]]:
            found = jax.device_get(run(state, jnp.asarray(images, jnp.float32)))
            return [self._objects(*(array[i] for array in found)) for i in range(len(images))]

        return look

    def _objects(self, shape, colour, size, numbers) -> tuple[np.ndarray, list[Thing]]:
        """Groups the pixels of one image; an object's attributes are the mean of its pixels'."""
        config, side = self.config, numbers.shape[0]
        solid = shape.argmax(-1) > 0
        ids = np.zeros(solid.shape, np.int32)
        ids[solid] = _group(_places(side, side)[solid] + numbers[solid][:, :2], side)
        things = []
        for i in range(1, ids.max(initial=0) + 1):
            own = ids == i
            mean = [_softmax(logits[own]).mean(0) for logits in (shape[..., 1:], colour, size)]
            kinds = (config.shapes, config.colours, config.sizes)
            words = [names[int(m.argmax())] for names, m in zip(kinds, mean, strict=True)]
            x, distance = numbers[own][:, 2:].mean(0)
            things.append(Thing(*words, float(x), float(distance) * FAR, float(mean[0].max())))
        return ids, things


def _places(height: int, width: int) -> np.ndarray:
    """The middle of every pixel (y, x) in image sides, [H, W, 2]."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).astype(np.float32)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _group(votes: np.ndarray, side: int) -> np.ndarray:
    """An object's number, from 1, for each of votes [N, 2] for a middle; 0 for none.

    The place with most votes around it is an object's middle, then the next of what is left.
    """
    ids, left = np.zeros(len(votes), np.int32), np.ones(len(votes), bool)
    middles = []
    least = LEAST * (side / 64) ** 2
    while left.sum() >= least:
        candidates = votes[left]
        bins = np.round(candidates / (RADIUS / 2)).astype(np.int64)
        _, inverse, counts = np.unique(bins, axis=0, return_inverse=True, return_counts=True)
        middle = candidates[inverse.ravel() == counts.argmax()].mean(0)
        near = np.linalg.norm(votes - middle, axis=1) < RADIUS
        middle = votes[near & left].mean(0) if (near & left).any() else middle
        taken = left & (np.linalg.norm(votes - middle, axis=1) < RADIUS)
        if taken.sum() < least:
            break
        middles.append(middle)
        left &= ~taken
        ids[taken] = len(middles)
    if middles and left.any():  # votes beside every middle go to the nearest
        away = np.linalg.norm(votes[left][:, None] - np.array(middles)[None], axis=-1)
        ids[left] = np.where(away.min(1) < 2 * RADIUS, away.argmin(1) + 1, 0)
    return ids


def object_loss(
    detector: ObjectDetector,
    images: Float[Array, "b H W 3"],
    ids: Int[Array, "b H W"],
    table: Float[Array, "b n 5"],
    keys: jax.Array,
) -> tuple[jax.Array, dict]:
    """Cross-entropy of shape, and on objects of colour and size; L1 of the four numbers.

    `table[b, i]`: shape (0: nothing), colour, size, screen x, distance of the object with id i.
    Images get noise of up to 8 % of their range and are blurred half of the time, as samples are.
    A pixel of an object counts 1 / `SOLID` as much as one of all, in every image. Returns the loss
    and metrics of each image, [B]: the share of pixels whose shape, and colour, is right.
    """
    images = jax.vmap(_worn)(keys, images)
    shape, colour, size, numbers = detector(images)
    own_BxHxWxN = jax.nn.one_hot(ids, table.shape[1])
    solid_BxHxW = (ids > 0).astype(jnp.float32)
    places = jnp.asarray(_places(*ids.shape[1:]))
    pixels_BxN = jnp.maximum(jnp.sum(own_BxHxWxN, axis=(1, 2)), 1.0)
    middle_BxNx2 = jnp.einsum("bhwn,hwc->bnc", own_BxHxWxN, places) / pixels_BxN[..., None]
    known_BxNx7 = jnp.concatenate([table, middle_BxNx2], axis=-1)
    wanted = jnp.einsum("bhwn,bnc->bhwc", own_BxHxWxN, known_BxNx7)
    kinds = jnp.round(wanted[..., :3]).astype(jnp.int32)
    away = wanted[..., 5:] - places[None]
    truth = jnp.concatenate([away, wanted[..., 3:4], wanted[..., 4:5] / FAR], axis=-1)

    each = partial(jnp.mean, axis=(1, 2))

    def on_objects(values):
        solid_B = jnp.maximum(jnp.sum(solid_BxHxW, axis=(1, 2)), 1.0)
        return jnp.sum(solid_BxHxW * values, axis=(1, 2)) / solid_B

    entropy = [
        _cross_entropy(logits, kinds[..., i]) for i, logits in enumerate((shape, colour, size))
    ]
    distance = jnp.sum(jnp.abs(numbers - truth), axis=-1)
    facts = 0.2 * (entropy[0] + entropy[1] + entropy[2]) + 2.0 * distance
    loss = each(entropy[0]) + each(solid_BxHxW * facts) / SOLID
    right = {
        "shape": each(shape.argmax(-1) == kinds[..., 0]),
        "colour": on_objects(colour.argmax(-1) == kinds[..., 1]),
        "away": on_objects(distance),
    }
    return loss, right


def _cross_entropy(logits: jax.Array, kinds: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), kinds[..., None], axis=-1)
    return -chosen[..., 0]


def _worn(key: jax.Array, image: jax.Array) -> jax.Array:
    """An image [H, W, 3] as samples may look: noisy, and half of the time blurred."""
    key_noise, key_amount, key_blur = jax.random.split(key, 3)
    soft = image
    for axis in (0, 1):
        soft = 0.5 * soft + 0.25 * (jnp.roll(soft, 1, axis) + jnp.roll(soft, -1, axis))
    image = jnp.where(jax.random.bernoulli(key_blur), soft, image)
    noise = jax.random.normal(key_noise, (image.size,)).reshape(image.shape)
    return image + 0.16 * jax.random.uniform(key_amount) ** 2 * noise
