"""Sketch: the contours of an image, by Canny or a learned detector, at every size alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, meant, register
from composer_jax.conditions.contours import contours
from composer_jax.conditions.image import (
    fit_map,
    load_array,
    load_image,
    load_rgba,
    on_white,
)
from composer_jax.conditions.maps import run_tool

DETECTORS = ("canny", "hed")

BASE = 256  # at this short side blur is one pixel and strokes are one pixel wide
UNIT = 16.0  # gradients go to Canny as int16; one grey level a pixel is UNIT
STEEP, WEAK = 1.5, 0.4  # high = STEEP x mean gradient, low = WEAK x high
FAINTEST = 3.0  # grey levels a blur width; what is fainter is no edge in any image
_NETWORK = "the edge detector"


class Sketch(Condition):
    """Lines on an empty ground, 1 where a line is.

    One photo gives one drawing at any size: blur and stroke width grow with the short side (1 px at
    256) and both thresholds follow the image's own mean gradient, so the share of inked pixels
    stays. Edges between colours of equal brightness count: the steepest channel decides.

    The tool is a learned detector (HED): uint8 [B, H, W, 3] -> edge probability, float [B, H, W] in
    [0, 1]. Its ridges are drawn, simplified: it sees things where Canny sees texture.
    """

    name = "sketch"
    doc = "contours, white on black or black on white"
    keep_probability = 0.5
    parts: Mapping[str, Part] = {"map": Part("spatial", (1,))}
    feature = Feature(("h", "w"), "uint8", "png", "lines")
    tool = "edges"
    reads = ()

    def __init__(
        self,
        detector: str | None = None,
        *,
        low: float | None = None,
        high: float | None = None,
        sigma: float | None = None,
        stroke: int | None = None,
    ):
        """`detector`: "canny", "hed", or None: the learned one wherever it is passed as tool.

        Without `low` and `high` Canny's thresholds follow the image; with them they are fixed.
        `low`, `high`: gradient, in grey levels per pixel of the blurred image; `sigma` (Canny's
        blur) and `stroke` (line width) in pixels, else by the size. Raises ValueError for another
        detector, for settings of Canny's with "hed", or where only one threshold is given or they
        are not in order.
        """
        if detector not in (None, *DETECTORS):
            raise ValueError(
                f"sketch: detector {detector!r}{meant(detector, DETECTORS)}; "
                f"allowed: {', '.join(DETECTORS)}, None"
            )
        if detector == "hed" and (low, high, sigma) != (None, None, None):
            raise ValueError("sketch: low, high and sigma are Canny's; detector 'hed' has none")
        if (low is None) != (high is None):
            raise ValueError("sketch: give both low and high, or neither")
        if low is not None and not 0.0 <= low <= high:
            raise ValueError(f"sketch: low {low} and high {high} must satisfy 0 <= low <= high")
        self._detector = detector
        self._thresholds = None if low is None else (low, high)
        self._sigma, self._stroke = sigma, stroke

    def extract(self, images, given=None, tool=None):
        """Lines uint8 [B, H, W], 0 or 255, of images uint8 [B, H, W, 3].

        By Canny (1986), or by the tool's probabilities (`contours`). Raises ValueError where the
        detector is "hed" and no tool is passed, or the tool gives something else.
        """
        del given
        images = np.asarray(images, np.uint8)
        if self._detector == "canny" or (self._detector is None and tool is None):
            return np.stack([self._canny(image) for image in images])
        if tool is None:
            raise ValueError(
                "sketch: detector 'hed' needs an edge detector passed as tool "
                "(composer_jax.models.hed.load_hed().tool())"
            )
        maps = run_tool(tool, images, _NETWORK)
        if maps.shape != images.shape[:3]:
            raise ValueError(f"{_NETWORK} gave maps of {maps.shape[1:]} for {images.shape[1:3]}")
        if not (maps.min() >= 0.0 and maps.max() <= 1.0):
            raise ValueError(f"{_NETWORK} gave values outside [0, 1]; probabilities are wanted")
        lines = [contours(one).astype(np.uint8) * np.uint8(255) for one in maps]
        return np.stack([self._thicken(one) for one in lines])

    def _canny(self, image: np.ndarray) -> np.ndarray:
        import cv2

        height, width = image.shape[:2]
        sigma = self._sigma or max(0.7, min(height, width) / BASE)
        smooth = cv2.GaussianBlur(
            image.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE
        )
        slopes = [
            cv2.Sobel(smooth, cv2.CV_32F, *way, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
            for way in ((1, 0), (0, 1))
        ]
        steepness = slopes[0] ** 2 + slopes[1] ** 2
        channel = steepness.argmax(axis=2)[..., None]
        dx, dy = (np.take_along_axis(slope, channel, axis=2)[..., 0] for slope in slopes)
        low, high = self._thresholds or self._own_thresholds(np.hypot(dx, dy), sigma)
        dx, dy = (np.rint(slope * UNIT).astype(np.int16) for slope in (dx, dy))
        lines = cv2.Canny(dx, dy, low * UNIT, high * UNIT, L2gradient=True)
        return self._thicken(lines)

    @staticmethod
    def _own_thresholds(gradient: np.ndarray, sigma: float) -> tuple[float, float]:
        high = max(STEEP * float(gradient.mean()), FAINTEST / sigma)
        return WEAK * high, high

    def _width(self, size: tuple[int, ...]) -> int:
        return self._stroke or max(1, round(min(size) / BASE))

    def _thicken(self, lines: np.ndarray) -> np.ndarray:
        """One-pixel lines to the stroke width of their size."""
        import cv2

        width = self._width(lines.shape)
        if width == 1:
            return lines
        shape = cv2.MORPH_RECT if width == 2 else cv2.MORPH_ELLIPSE
        return cv2.dilate(lines, cv2.getStructuringElement(shape, (width, width)))

    def fit(self, stored, size):
        """Crops and resizes lines uint8 [h, w]; none is lost, and all get the stroke of `size`."""
        stored = np.asarray(stored)
        if stored.shape == tuple(size):
            return stored
        return self._thicken(fit_map(stored, size, "lines"))

    def value(self, stored):
        """Lines float32 [h, w, 1], 0 or 1."""
        return {"map": (jnp.asarray(stored, jnp.float32) / 255.0)[..., None]}

    def parse(self, text, tool=None):
        """A drawing, or a photo, whose contours are taken as `extract` takes them; returns lines
        uint8 [h, w], 0 or 255, of the stroke of their size.

        `text`: a picture as `load_image` takes it, file or array, or whole numbers 0 and 1. All are
        read alike: a drawing is mostly its ground, black or white, or transparent, and its ink is
        thin. What is stored is such a drawing, white on black.
        """
        if isinstance(text, str | os.PathLike) and Path(text).suffix.lower() == ".npy":
            array = load_array(text)
        else:
            array = text if isinstance(text, str | os.PathLike) else np.asarray(text)
        if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.size:
            array = array > 0 if np.isin(array, (0, array.max())).all() else array
        image = _on_ground(load_rgba(array))
        ink = _ink(image)
        if ink is None:
            return self.extract(image[None], tool=tool)[0]
        if np.isin(image, (0, 255)).all() and _core(ink, self._width(ink.shape) + 2) < 0.02:
            return ink  # drawn by a machine, and no wider than ours
        return self._thicken(_skeleton(ink))

    def render(self, stored):
        """White lines on black, uint8 [h, w, 3]."""
        return np.repeat(np.asarray(stored, np.uint8)[..., None], 3, axis=2)

    def measure(self, wanted, image, tool=None):
        """Shift-corrected F1@1px: F1(wanted) less the mean F1 of wanted rolled by half a side.

        At most 1; what chance would reach is 0. Returns nan where lines cover under 2 % of
        `wanted`, too little to measure on: evaluation leaves such images out and counts them.
        """
        found = self.extract(load_image(image)[None], tool=tool)[0] > 0
        lines = self.fit(wanted, found.shape) > 0
        if lines.mean() < 0.02:
            return float("nan")
        height, width = lines.shape
        rolls = ((height // 2, 0), (0, width // 2), (height // 2, width // 2))
        chance = np.mean([f1(np.roll(lines, roll, (0, 1)), found) for roll in rolls])
        return float(f1(lines, found) - chance)


def f1(wanted: np.ndarray, found: np.ndarray) -> float:
    """F1 of two line maps bool [h, w], where a line within one pixel counts as met."""
    import cv2

    around = np.ones((3, 3), np.uint8)
    near_wanted, near_found = (cv2.dilate(x.astype(np.uint8), around) > 0 for x in (wanted, found))
    precision = (found & near_wanted).sum() / max(found.sum(), 1)
    recall = (wanted & near_found).sum() / max(wanted.sum(), 1)
    return float(2.0 * precision * recall / max(precision + recall, 1e-12))


def _on_ground(image: np.ndarray) -> np.ndarray:
    """A picture, uint8 [h, w, 3], of [h, w, 3 or 4]: what is transparent has no ink."""
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:]
    painted = np.repeat(alpha, 3, axis=2)
    if alpha.mean() < 128 and _ink(painted) is not None:
        return painted  # lines of any colour on nothing
    white, black = on_white(image), 255 - on_white(np.dstack([255 - image[..., :3], alpha]))
    lines = _ink(black) if _ink(white) is None else None
    drawn_on_black = lines is not None and lines.any()
    return black if white.min() > 250 or drawn_on_black else white


def _ink(image: np.ndarray) -> np.ndarray | None:
    """The ink of a drawing, uint8 [h, w], 0 or 255; None where the image is no drawing.

    A drawing is mostly its ground, black or white, and its ink is thin.
    """
    import cv2

    black, white = image.max(axis=2), 255 - image.min(axis=2)  # how far from either ground
    away = min(black, white, key=lambda distance: distance.mean(dtype=np.float64))
    if np.mean(away < 32) < 0.5:
        return None
    threshold, _ = cv2.threshold(away, 0, 255, cv2.THRESH_OTSU)
    ink = (away > max(threshold, 24)).astype(np.uint8) * np.uint8(255)
    return ink if _core(ink, max(3, min(ink.shape) // 32)) < 0.1 else None


def _core(ink: np.ndarray, width: int) -> float:
    """The share of ink whose whole surrounding of `width` pixels is ink: 0 for thin lines."""
    import cv2

    core = cv2.erode(ink, np.ones((width, width), np.uint8), borderValue=0)
    return np.count_nonzero(core) / max(np.count_nonzero(ink), 1)


def _skeleton(ink: np.ndarray) -> np.ndarray:
    from skimage.morphology import skeletonize

    return skeletonize(ink > 0).astype(np.uint8) * np.uint8(255)


register(Sketch())
