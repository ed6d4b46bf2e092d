"""Colours as a file means them: embedded ICC profiles and PNG's gamma, brought to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np

SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}  # Pillow's mode -> the profile's colour space
CLASSES = ("mntr", "prtr", "scnr", "spac")  # profiles of devices and spaces, not links
SRGB_GAMMA = 1 / 2.2  # what files that mean sRGB give in PNG's gAMA
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue: x, y
_SRGB_TO_XYZ = np.array(  # IEC 61966-2-1
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
_BRADFORD = np.array(  # XYZ to the cones of Bradford's adaptation (ICC.1:2022, annex E)
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def to_srgb(image):
    """A Pillow image of 8 bits a channel, in any mode, as RGB or, with transparency, RGBA in sRGB.

    An embedded ICC profile is applied by relative colorimetric intent with black point
    compensation. One that is broken, is for another kind of image, or moves no colour by more than
    a level (sRGB itself) counts as none. Without one, PNG's gAMA and cHRM count, unless they say
    what sRGB says or an sRGB chunk is there. Alpha is kept.
    """
    from PIL import ImageCms

    if image.mode == "LAB":
        return image.convert("RGB")
    rgba = image.convert("RGBA") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA", "La"):
        colour = image.convert("L")
    elif image.mode in ("RGB", "CMYK"):
        colour = image
    else:
        colour = (rgba or image).convert("RGB")
    profile = image.info.get("icc_profile")
    transform = _transform(profile, colour.mode) if profile else None
    if transform is None and profile and colour.mode == "L":  # grey pixels, a profile of RGB
        transform = _transform(profile, "RGB")
        colour = colour.convert("RGB") if transform else colour
    if transform is not None:
        colour = ImageCms.applyTransform(colour, transform)
    elif not profile and "srgb" not in image.info:
        colour = _from_gamma(colour, image.info.get("gamma"), image.info.get("chromaticity"))
    colour = colour if colour.mode == "RGB" else colour.convert("RGB")
    if rgba is not None:
        colour = colour.copy() if colour is image else colour
        colour.putalpha(rgba.getchannel("A"))
    return colour


@lru_cache(1)
def _srgb():
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


@lru_cache(64)
def _transform(profile: bytes, mode: str):
    """From a profile, for images of that mode, to sRGB; None where it counts as none."""
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        about = source.profile
        if about.xcolor_space != SPACES[mode] or about.device_class not in CLASSES:
            return None
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        made = ImageCms.buildTransform(source, _srgb(), mode, "RGB", intent, flags)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):  # broken
        return None
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    axes = np.meshgrid(*[levels] * {"L": 1, "RGB": 3, "CMYK": 4}[mode], indexing="ij")
    probe = np.stack([axis.ravel() for axis in axes], axis=-1)
    colours = Image.frombytes(mode, (len(probe), 1), probe.tobytes())
    seen = np.asarray(ImageCms.applyTransform(colours, made))[0].astype(int)
    if seen[0 if mode == "CMYK" else -1].min() < 128:  # no profile of a device has a dark white
        return None
    return None if mode != "CMYK" and np.abs(seen - probe).max() <= 1 else made


def _from_gamma(colour, gamma: float | None, primaries: tuple[float, ...] | None):
    """An L or RGB image under PNG's gAMA and cHRM; as it is where these say sRGB or nonsense."""
    from PIL import Image

    if colour.mode not in ("L", "RGB") or not gamma or not 0.1 < gamma < 5.0:
        return colour
    own = _to_xyz(primaries) if colour.mode == "RGB" and primaries else None
    usual = abs(gamma / SRGB_GAMMA - 1.0) < 0.05  # libpng's threshold
    if usual and own is None:
        return colour
    levels = np.arange(256) / 255.0
    linear = linear_from_srgb(levels) if usual else levels ** (1.0 / gamma)
    if own is None:
        return colour.point(list(_encoded(linear)) * len(colour.getbands()))
    matrix = np.linalg.inv(_SRGB_TO_XYZ) @ _adapted(own)
    return Image.fromarray(_encoded(linear[np.asarray(colour)] @ matrix.T))


def linear_from_srgb(levels: np.ndarray) -> np.ndarray:
    """Linear light of sRGB's levels, both float in [0, 1] (IEC 61966-2-1)."""
    return np.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)


def _encoded(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0.0, 1.0)
    levels = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.rint(levels * 255.0).astype(np.uint8)


def _to_xyz(primaries) -> np.ndarray | None:
    """The matrix from linear RGB to XYZ, [3, 3], of white, red, green and blue as x, y each; None
    where these are sRGB's, or span no colours."""
    x, y = np.asarray(primaries, np.float64).reshape(4, 2).T
    usual = np.abs(np.subtract(primaries, SRGB_PRIMARIES)).max() <= 0.01
    if usual or y.min() <= 0.0:
        return None
    white_red_green_blue = np.stack([x / y, np.ones(4), (1.0 - x - y) / y])
    white, rgb = white_red_green_blue[:, 0], white_red_green_blue[:, 1:]
    if abs(np.linalg.det(rgb)) < 1e-6:
        return None
    return rgb * np.linalg.solve(rgb, white)[None]


def _adapted(to_xyz: np.ndarray) -> np.ndarray:
    """The same with sRGB's white, by Bradford's adaptation."""
    own, wanted = (_BRADFORD @ m.sum(axis=1) for m in (to_xyz, _SRGB_TO_XYZ))
    return np.linalg.inv(_BRADFORD) @ np.diag(wanted / own) @ _BRADFORD @ to_xyz
