"""A drawing from edge probabilities: ridges, thinned, without spurs, bubbles and crumbs."""

from __future__ import annotations

import numpy as np

# Lengths are in units of which the short side has UNITS, so that size does not matter.
UNITS = 256
LIKELY, LIKELY_BESIDE = 0.4, 0.15  # a line has a pixel of the one, and all of the other
BLUR, SLOPE_BLUR = 0.7, 1.0  # of the probabilities, and of what says where a line leads
BRIDGE, BUBBLE = 0.5, 40  # gaps up to 2 x BRIDGE are closed; holes under BUBBLE square units, too
SPUR, CRUMB = 8, 12  # branches and lines that are shorter are dropped
AROUND = np.ones((3, 3), np.uint8)


def contours(probability: np.ndarray) -> np.ndarray:
    """Lines bool [H, W], one pixel wide, where probabilities [H, W] in [0, 1] have their ridges.

    Non-maximum suppression across the ridge and hysteresis (Canny 1986), and a simplification: gaps
    are bridged, double lines become one, short branches and short lines are left out.
    """
    import cv2
    from skimage.filters import apply_hysteresis_threshold
    from skimage.morphology import skeletonize

    unit = min(probability.shape) / UNITS
    likely = _blur(probability, BLUR * unit)
    ridges = (_summit(likely, probability, unit) & (likely > LIKELY_BESIDE)).astype(np.uint8)
    bridge = (2 * round(BRIDGE * unit) + 1,) * 2
    shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, bridge)
    ridges = cv2.morphologyEx(ridges, cv2.MORPH_CLOSE, shape) > 0
    lines = skeletonize(~_without_small(~ridges, BUBBLE * unit**2, diagonal=False))
    lines = apply_hysteresis_threshold(np.where(lines, likely, 0.0), LIKELY_BESIDE, LIKELY)
    for _ in range(2):  # a short branch may end in branches that are shorter still
        lines = skeletonize(_without_spurs(lines, SPUR * unit))
    return _without_small(lines, CRUMB * unit, diagonal=True)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    import cv2

    image = np.asarray(image, np.float32)
    return cv2.GaussianBlur(image, (0, 0), max(sigma, 0.5), borderType=cv2.BORDER_REPLICATE)


def _summit(likely: np.ndarray, probability: np.ndarray, unit: float) -> np.ndarray:
    """Where `likely` is larger than a unit away on both sides, across the strongest curvature."""
    import cv2

    smooth = _blur(probability, SLOPE_BLUR * unit)
    xx, yy, xy = (
        cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=3) for order in ((2, 0), (0, 2), (1, 1))
    )
    along = 0.5 * np.arctan2(2.0 * xy, xx - yy)
    rows, columns = np.indices(likely.shape, np.float32)
    down, right = np.cos(along) * max(unit, 1.0), -np.sin(along) * max(unit, 1.0)
    higher = np.ones(likely.shape, bool)
    for way in (-1.0, 1.0):
        beside = cv2.remap(
            likely,
            columns + way * right,
            rows + way * down,
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=1.0,  # the image's own border is no contour
        )
        higher &= likely > beside
    return higher


def _without_small(mask: np.ndarray, least: float, *, diagonal: bool) -> np.ndarray:
    """The connected parts of a mask that have at least so many pixels."""
    from scipy.ndimage import label

    parts, _ = label(mask, AROUND if diagonal else None)
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    return ((counts >= least) & (counts > 0))[parts]


def _without_spurs(lines: np.ndarray, least: float) -> np.ndarray:
    """Thin lines without the branches under `least` pixels that lead from a joint to nothing."""
    import cv2
    from scipy.ndimage import label

    dots = lines.astype(np.uint8)
    count = cv2.filter2D(dots, -1, AROUND, borderType=cv2.BORDER_CONSTANT) - dots
    joints = lines & (count > 2)
    branches, number = label(lines & ~joints, AROUND)
    sizes = np.bincount(branches.ravel(), minlength=number + 1)
    ends = np.bincount(branches[lines & (count == 1)], minlength=number + 1)
    near_joints = cv2.dilate(joints.astype(np.uint8), AROUND) > 0
    meets = np.bincount(branches[near_joints], minlength=number + 1)
    spurs = (sizes < least) & (ends > 0) & (meets > 0)
    spurs[0] = False
    return lines & ~spurs[branches]
