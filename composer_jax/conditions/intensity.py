"""Intensity: the image in grey, under any of several ways to weigh red, green and blue."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, register
from composer_jax.conditions.image import load_image

# The preset list that `draw` picks from: a model trained on all of them relies on none.
WEIGHTS = np.array(
    [
        [0.299, 0.587, 0.114],  # ITU-R BT.601, the default
        [0.2126, 0.7152, 0.0722],  # ITU-R BT.709
        [1 / 3, 1 / 3, 1 / 3],  # mean
        [1.0, 0.0, 0.0],  # red filter
        [0.0, 1.0, 0.0],  # green filter
        [0.0, 0.0, 1.0],  # blue filter
        [0.5, 0.5, 0.0],  # yellow filter
        [0.5, 0.0, 0.5],  # magenta filter
        [0.0, 0.5, 0.5],  # cyan filter
        [0.6, 0.3, 0.1],  # mostly red
        [0.2, 0.2, 0.6],  # mostly blue
    ],
    np.float32,
)


class Intensity(Condition):
    """Brightness without colour; the weights travel with what is stored, so it can be checked."""

    name = "intensity"
    doc = "the picture in grey"
    keep_probability = 0.3
    parts: Mapping[str, Part] = {"map": Part("spatial", (1,))}
    feature: Mapping[str, Feature] = {
        "map": Feature(("h", "w"), "uint8", "png", "photo"),
        "weights": Feature((3,), "float32", "raw"),
    }
    cached = False

    def extract(self, images, given=None, tool=None):
        """Grey maps uint8 [B, H, W] of images uint8 [B, H, W, 3], and weights float32 [B, 3]:
        those of `given["intensity"]`, else BT.601.

        Raises ValueError where given weights are negative or do not sum to 1.
        """
        del tool
        images = np.asarray(images, np.uint8)
        weights = (given or {}).get("intensity")
        if weights is None:
            weights = np.repeat(WEIGHTS[:1], len(images), axis=0)
        weights = np.asarray(weights, np.float32)
        if (
            weights.shape != (len(images), 3)
            or not np.all(weights >= 0.0)
            or not np.allclose(weights.sum(axis=1), 1.0, atol=1e-3)
        ):
            raise ValueError(
                f"intensity: weights must be [{len(images)}, 3], not negative, each row summing "
                f"to 1; given: shape {weights.shape}"
            )
        grey = [_grey(image, weight) for image, weight in zip(images, weights, strict=True)]
        return {"map": np.stack(grey), "weights": weights}

    def draw_weights(self, key: jax.Array) -> jax.Array:
        """The weights float32 [3] that `draw` takes under the same key."""
        return jnp.asarray(WEIGHTS)[jax.random.randint(key, (), 0, len(WEIGHTS))]

    def draw(self, key, stored, image):
        """Grey float32 [H, W, 1] of `image` under weights drawn from the preset list."""
        del stored
        weights = self.draw_weights(key)
        return {"map": jnp.sum(image * weights[None, None, :], axis=-1, keepdims=True)}

    def value(self, stored):
        """The grey map, float32 [h, w, 1] in [0, 1]."""
        return {"map": (jnp.asarray(stored["map"], jnp.float32) / 255.0)[..., None]}

    def parse(self, text, tool=None):
        """An image, grey or colour, path or array, under BT.601; or a stored example."""
        stored = self.unpacked(text, tool)
        if stored is not None:
            return stored
        return {"map": _grey(load_image(text), WEIGHTS[0]), "weights": WEIGHTS[0].copy()}

    def checked(self, stored, sizes=MappingProxyType({})):
        """As of any condition; raises ValueError for weights that do not sum to 1, too."""
        stored = super().checked(stored, sizes)
        if stored["weights"].min() < 0.0 or abs(stored["weights"].sum() - 1.0) > 1e-3:
            raise ValueError("intensity's weights are to sum to 1, none of them negative")
        return stored

    def render(self, stored):
        """The grey map, uint8 [h, w, 3]."""
        return np.repeat(np.asarray(stored["map"], np.uint8)[..., None], 3, axis=2)

    def measure(self, wanted, image, tool=None):
        """SSIM of the wanted map and the image under the wanted weights."""
        del tool
        image = load_image(image)
        grey = _grey(image, np.asarray(wanted["weights"], np.float32))
        return ssim(self.fit(wanted, image.shape[:2])["map"], grey)


def _grey(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.rint(image.astype(np.float32) @ weights).clip(0, 255).astype(np.uint8)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two grey images uint8 [h, w] of any size (Wang et al. 2004, eq. 13).

    Gaussian window of 11 x 11, sigma 1.5; the mean is taken where the window fits, or over
    everything where it fits nowhere.
    """
    from scipy.ndimage import gaussian_filter

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = smooth(a), smooth(b)
    variance_a = smooth(a * a) - mean_a**2
    variance_b = smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    likeness = (2.0 * mean_a * mean_b + c1) * (2.0 * covariance + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    inside = likeness[5:-5, 5:-5]
    return float((inside if inside.size else likeness).mean())


register(Intensity())
