"""Palette: how much of which colour, as a histogram over 156 colours in CIELab (Composer, 3.1)."""

from __future__ import annotations

import colorsys
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, meant, register
from composer_jax.conditions.colour import linear_from_srgb
from composer_jax.conditions.image import load_array, load_image, load_rgba
from composer_jax.utils.values import shown

BINS = 156
TABLE = Path(__file__).parents[1] / "assets" / "palette.npz"  # of benchmarks/palette.py --make
ALLOWED = "allowed: #rgb, #rrggbb or a CSS name, each with an optional :weight, split by commas"
FORMS = f"allowed: colours ('#d62828:0.6,#003049:0.4'), {BINS} numbers, or an image [H, W, 3]"

# sRGB (D65, 2 degrees) to XYZ, divided by the white point; the rounding is the common libraries'.
_XYZ = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
) / np.array([[0.95047], [1.0], [1.08883]])


def codebook() -> np.ndarray:
    """The 156 colours, float64 [156, 3] RGB in [0, 1].

    The codebook of the `rayleigh` project as VideoComposer uses it: 11 hues, each through 13 rows
    of rising saturation and falling value, then 13 greys from white to black.
    """
    hues = (0.0, 0.0833, 0.166, 0.25, 0.333, 0.5, 0.56333, 0.666, 0.73, 0.803, 0.916)
    darker = np.linspace(1.0, 0.2, 6)[1:-1]
    rows = [(saturation, 1.0) for saturation in np.linspace(0.0, 1.0, 7)[1:-1]]
    rows += [(1.0, 1.0)]
    rows += [(1.0, value) for value in darker]
    rows += [(0.4, value) for value in darker[:-1]]
    colours = [colorsys.hsv_to_rgb(hue, *row) for hue in hues for row in rows]
    greys = [(grey,) * 3 for grey in np.linspace(1.0, 0.0, 13)]
    return np.array(colours + greys)


def lab_from_rgb(rgb: np.ndarray) -> np.ndarray:
    """sRGB float64 [..., 3] in [0, 1] to CIELab (CIE 1976, D65), float64 [..., 3]."""
    return _lab_from_xyz(linear_from_srgb(rgb) @ _XYZ.T)


def _lab_from_xyz(xyz: np.ndarray) -> np.ndarray:
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def smoothing(lab: np.ndarray, s: float) -> np.ndarray:
    """Weights w_ij = exp(-|lab_i - lab_j|^2 / (2 s^2)), rows summing to 1; float32 [156, 156]."""
    squared = np.sum((lab[:, None] - lab[None, :]) ** 2, axis=-1)
    weights = np.exp(-squared / (2.0 * s**2))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def nearest_codes(colours: np.ndarray, lab: np.ndarray) -> np.ndarray:
    """The codeword nearest in CIELab to each of `colours` uint8 [N, 3]; uint8 [N], the first of
    equals. By all distances: the definition, from which the bundled table was made."""
    pixels_Nx3 = lab_from_rgb(colours / 255.0)
    distance_NxK = np.sum(lab**2, axis=1)[None, :] - 2.0 * pixels_Nx3 @ lab.T
    return distance_NxK.argmin(axis=1).astype(np.uint8)


@cache
def nearest_table() -> np.ndarray:
    """`nearest_codes` of all colours, by red x 256^2 + green x 256 + blue; uint8 [256^3]."""
    with np.load(TABLE) as file:
        return file["codes"]


class Palette(Condition):
    """Colour as a 156-bin CIELab histogram: stored as counted, smoothed when the network sees it.

    Every colour's nearest codeword stands in a bundled table: 512 x 512 px are counted 111 times
    as fast as by the direct pixel-by-codeword distance matrix, in one run, and 11 times as fast in
    the first image of a process (benchmarks/palette.py).
    """

    name = "palette"
    doc = "colours and their shares, as hex colours, an image or a histogram"
    keep_probability = 0.5
    parts: Mapping[str, Part] = {"vector": Part("vector", (BINS,), norm=0.3)}
    feature = Feature((BINS,), "float32", "raw")
    reads = ("alpha",)

    def __init__(self, s: float = 10.0):
        """`s`: the smoothing's width in CIELab units (10 in VideoComposer's configuration)."""
        self.rgb = codebook()
        self.lab = lab_from_rgb(self.rgb)
        self._weights = smoothing(self.lab, s)

    def extract(self, images, given=None, tool=None):
        """Unsmoothed histograms float32 [B, 156], each summing to 1, of uint8 [B, H, W, 3].

        Pixels count by `given["alpha"]`, uint8 [B, H, W], where it is known. Raises ValueError for
        an image that is transparent all over.
        """
        del tool
        images = np.asarray(images, np.uint8)
        alphas = (given or {}).get("alpha")
        alphas = [None] * len(images) if alphas is None else alphas
        return np.stack([self._histogram(*one) for one in zip(images, alphas, strict=True)])

    def _histogram(self, image: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
        bgr0 = np.zeros((image.size // 3, 4), np.uint8)
        bgr0[:, :3] = image.reshape(-1, 3)[:, ::-1]
        codes = nearest_table()[bgr0.view("<u4")[:, 0]]
        shares = None if alpha is None else np.asarray(alpha, np.float64).ravel()
        total = codes.size if shares is None else shares.sum()
        if not total:
            raise ValueError("palette: the image is transparent all over")
        return (np.bincount(codes, shares, BINS) / total).astype(np.float32)

    def _of_image(self, source) -> np.ndarray:
        image = load_rgba(source)
        return self._histogram(
            np.ascontiguousarray(image[..., :3]), image[..., 3] if image.shape[2] == 4 else None
        )

    def value(self, stored):
        """The smoothed histogram, float32 [156]; entries under 1e-5 are 0."""
        histogram = jnp.asarray(stored, jnp.float32)
        smooth = jnp.dot(self._weights, histogram, precision=jax.lax.Precision.HIGHEST)
        return {"vector": jnp.where(smooth < 1e-5, 0.0, smooth)}

    def parse(self, text, tool=None):
        """`#d62828:0.6,#003049:0.4` (weights optional; CSS names too), a list of such, an image
        or a .npy with 156 counts or an image; returns the histogram float32 [156]. Pixels of an
        image count by their alpha."""
        del tool
        if isinstance(text, str) and _is_colours(text):
            return self._from_colours(text.split(","))
        if isinstance(text, str | os.PathLike):
            if str(text).lower().endswith(".npy"):
                return self._from_array(load_array(text), str(text))
            return self._of_image(text)
        if isinstance(text, Sequence) and text and all(isinstance(item, str) for item in text):
            return self._from_colours(text)
        array = np.asarray(text)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"the palette is {shown(text)}; {FORMS}")
        return self._from_array(array, "the palette")

    def _from_array(self, array: np.ndarray, what: str) -> np.ndarray:
        if array.ndim in (2, 3):
            return self._of_image(array)
        if array.shape != (BINS,) or array.dtype.kind not in "fiu":
            raise ValueError(f"{what} has shape {array.shape} of {array.dtype}; {FORMS}")
        counts = array.astype(np.float64)
        if not (np.all(np.isfinite(counts)) and counts.min() >= 0.0 and counts.sum() > 0.0):
            raise ValueError(f"{what} must have counts that are not negative and not all 0")
        return (counts / counts.sum()).astype(np.float32)

    def _from_colours(self, items: Sequence[str]) -> np.ndarray:
        counts = np.zeros(BINS)
        for item in items:
            colour, _, weight = item.strip().partition(":")
            rgb = np.array(_rgb(colour.strip())) / 255.0
            distance = np.sum((self.lab - lab_from_rgb(rgb)[None]) ** 2, axis=-1)
            counts[distance.argmin()] += _weight(weight.strip() or "1", item)
        if counts.sum() <= 0.0:
            raise ValueError(f"palette {','.join(items)!r}: at least one weight must be above 0")
        return (counts / counts.sum()).astype(np.float32)

    def render(self, stored):
        """Colour swatches, largest share first, as wide as their shares; uint8 [64, 256, 3].

        A share is a number of pixels, column by column: `parse` reads it back to 1 / 16384.
        """
        shares = np.asarray(stored, np.float64)
        order = np.argsort(-shares, kind="stable")
        ends = np.cumsum(shares[order])
        positions = (np.arange(256 * 64) + 0.5) / (256 * 64) * max(ends[-1], 1e-12)
        bins = order[np.searchsorted(ends, positions).clip(0, BINS - 1)]
        pixels = np.rint(self.rgb[bins] * 255.0).astype(np.uint8)
        return np.ascontiguousarray(pixels.reshape(256, 64, 3).swapaxes(0, 1))

    def measure(self, wanted, image, tool=None):
        """Intersection of the unsmoothed histograms, in [0, 1]."""
        del tool
        found = self._histogram(load_image(image))
        return float(np.minimum(np.asarray(wanted, np.float32), found).sum())

    def beside(self, rows):
        """How far colour has to be moved, in units of CIELab: the mean over L, a and b of the
        Wasserstein distances of the unsmoothed histograms along each axis; 0 is perfect."""
        del rows

        def wasserstein(row, image, tool=None) -> float:
            from scipy.stats import wasserstein_distance

            del tool
            found = self._histogram(load_image(image))
            away = [wasserstein_distance(axis, axis, row[self.name], found) for axis in self.lab.T]
            return float(np.mean(away))

        return {"Lab Wasserstein": wasserstein}


def _is_colours(text: str) -> bool:
    """Colours, or a mistyped one; a path has a folder or a suffix and does not start with #."""
    from PIL import ImageColor

    first = re.split("[,:]", text, maxsplit=1)[0].strip()
    if first.startswith("#") or first.lower() in ImageColor.colormap:
        return True
    return not (os.path.exists(text) or os.sep in text or os.path.splitext(text)[1])


def _rgb(colour: str) -> tuple[int, ...]:
    from PIL import ImageColor

    if re.fullmatch(r"#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})", colour):
        return ImageColor.getrgb(colour)
    if colour.lower() in ImageColor.colormap:
        return ImageColor.getrgb(colour.lower())
    close = meant(colour.lower(), list(ImageColor.colormap))
    raise ValueError(f"palette: {colour!r} is not a colour{close}; {ALLOWED}")


def _weight(text: str, item: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not (0.0 <= weight < float("inf")):
        raise ValueError(f"palette: {text!r} in {item.strip()!r} is not a weight; {ALLOWED}")
    return weight


register(Palette())
