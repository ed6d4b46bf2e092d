"""Class maps that an editor smoothed: colours that are blends of others, along borders alone."""

from __future__ import annotations

import logging

import numpy as np

from composer_jax.conditions.maps import MAX_IDS

log = logging.getLogger("composer_jax")

NEAR = 16.0  # of 255, how far from the line between two colours a blend of them may be
BEYOND = 0.2  # of their distance, how far bicubic and Lanczos filters overshoot
REACH = 8.0  # pixels from a solid colour; what is farther is no border
OVERSHOOT = 32.0  # of 255, of the same filters beside a border
FEW = 9  # pixels; corners blend three colours


def without_blends(levels: np.ndarray, coloured: bool, what) -> np.ndarray:
    """Levels [H, W], where blends take the level of the nearest pixel that is none.

    A level is solid where it fills a square of 3 x 3 pixels somewhere; another one on the line
    through two solid ones is a blend. Where blends outnumber solid levels the map was smoothed, and
    the log says so; else thin things may be meant, and all stay. `coloured`: levels are 24-bit
    colours, else grey.
    """
    from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

    there, counts = np.unique(levels, return_counts=True)
    if len(there) <= 4:  # more blends than solid levels, of which blends need two
        return levels
    solid = np.unique(levels[maximum_filter(levels, 3) == minimum_filter(levels, 3)])
    others = ~np.isin(there, solid)
    if not 2 <= len(solid) <= MAX_IDS or others.sum() <= len(solid):
        return levels
    between = np.zeros(len(there), bool)
    between[others] = _between(_colours(there[others], coloured), _colours(solid, coloured))
    blends = others & (between | (counts < FEW))
    if between.sum() <= len(solid) or counts[between].sum() < 0.9 * counts[others].sum():
        return levels
    mixed = np.isin(levels, there[blends])
    away = distance_transform_edt(mixed)
    if away.max() > REACH:
        return levels
    settled = _overshoots(levels, mixed, solid, coloured)
    nearest = distance_transform_edt(
        np.isin(settled, there[blends]), return_distances=False, return_indices=True
    )
    log.warning(
        "%s: %d of its %d colours are only blends along borders, as smoothing makes them, and are "
        "read as the colours beside them; turn anti-aliasing off, and resize by nearest neighbour",
        what,
        blends.sum(),
        len(there),
    )
    return settled[tuple(nearest)]


def _overshoots(levels, mixed, solid, coloured: bool) -> np.ndarray:
    """Levels, where mixed pixels that all but have a solid colour, and touch it, take it."""
    from scipy.ndimage import maximum_filter

    settled, colours = levels.copy(), _colours(levels[mixed], coloured)
    side = 2 * int(REACH) + 1
    for level in solid:
        close = np.abs(colours - _colours(level[None], coloured)).max(axis=1) <= OVERSHOOT
        beside = maximum_filter(levels == level, side)[mixed]
        settled[mixed] = np.where(close & beside, level, settled[mixed])
    return settled


def _colours(levels: np.ndarray, coloured: bool) -> np.ndarray:
    """float32 [N, 3]."""
    if coloured:
        levels = np.stack([levels >> 16, levels >> 8 & 255, levels & 255], axis=-1)
    else:
        levels = np.repeat(levels[:, None], 3, axis=1)
    return levels.astype(np.float32)


def _between(colours_Nx3: np.ndarray, solid_Kx3: np.ndarray) -> np.ndarray:
    """Which colours lie on the line through some two solid ones, near these; bool [N]."""
    found = np.zeros(len(colours_Nx3), bool)
    for i, a in enumerate(solid_Kx3):
        for b in solid_Kx3[:i]:
            way = b - a
            along = ((colours_Nx3 - a) @ way / np.dot(way, way)).clip(-BEYOND, 1.0 + BEYOND)
            blend = (a + along[:, None] * way).clip(0.0, 255.0)
            found |= np.abs(blend - colours_Nx3).max(axis=1) <= NEAR
    return found
