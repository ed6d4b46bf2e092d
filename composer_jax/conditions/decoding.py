"""Image files decoded: by Pillow, and by OpenCV where Pillow drops bits."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_PIXELS = 100_000_000  # read from the header, before anything is decoded
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # of TIFF's and EXIF's tags
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF's orientation -> what undoes it
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def decode(file, path: str, finish: Callable[[Any, np.ndarray | None], np.ndarray]) -> np.ndarray:
    """Decodes a path or a stream, which errors call `path`. `finish` takes the Pillow image and,
    where Pillow's has fewer bits or is no image of 8 bits, its numbers [H, W] or [H, W, C]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            _check_size(path, image.width * image.height, f"{image.width} x {image.height} px")
            layout = _layout(image, path)
            image.load()
            deep = _deep(image, layout, file)
            return finish(image if deep is not None else ImageOps.exif_transpose(image), deep)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        _check_size(path, MAX_PIXELS + 1, f"{pixels[0]} px" if pixels else "huge")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image (PNG, JPEG, WebP and others are)") from error
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if path in str(error):
            raise
        raise ValueError(f"{path} is broken: {error}") from error
    except Exception as error:  # decoders raise whatever they like on bad bytes
        raise ValueError(f"{path} is broken: {str(error) or type(error).__name__}") from error


def numbers(image, deep: np.ndarray | None) -> np.ndarray:
    """A `finish` of `decode`: the file's numbers as they stand, [H, W] or [H, W, 3 or 4]."""
    if deep is not None:
        return deep
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _check_size(path: str, pixels: int, size: str) -> None:
    if pixels > MAX_PIXELS:
        raise ValueError(f"{path} is too large ({size}); at most {MAX_PIXELS // 10**6} megapixels")


def _layout(image, path: str) -> str:
    """How a file's pixels are packed, in Pillow's words: "RGB;16B"; "" where it does not say."""
    args = [t.args if isinstance(t.args, tuple | list) else (t.args,) for t in image.tile]
    words = [one[0] for one in args if one and isinstance(one[0], str)]
    tags = getattr(image, "tag_v2", {})
    if words[:1] == ["R"] and 16 in tags.get(BITS, ()):
        raise ValueError(f"{path} holds 16 bits in separate planes, which cannot be read; save it "
                         "with interleaved channels, or compressed")  # fmt: skip
    return words[0] if words else ""


def _deep(image, layout: str, file) -> np.ndarray | None:
    """The numbers of an image that has no 8 bits a channel, turned as EXIF says; else None.

    Of 16 bits in colour Pillow keeps the upper 8, so OpenCV reads them.
    """
    from PIL import ImageOps

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(ImageOps.exif_transpose(image))
        if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
            values = np.uint16(65535) - values  # white is zero
        clear = image.info.get("transparency")
        if not isinstance(clear, int):
            return values
        return np.stack([values, np.where(values == clear, 0, 65535).astype(values.dtype)], axis=-1)
    if ";16" not in layout or image.mode not in ("RGB", "RGBA"):
        return None
    import cv2

    content = file.getbuffer() if isinstance(file, io.BytesIO) else np.fromfile(file, np.uint8)
    deep = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.ndim != 3 or deep.dtype != np.uint16 or deep.shape[2] < 3:
        return None
    alpha = deep.shape[2] == 4 and image.has_transparency_data
    deep = deep[..., [2, 1, 0, 3][: 3 + alpha]]
    if layout.startswith("RGBa"):  # colours were multiplied by alpha
        colour = deep[..., :3] * 65535.0 / np.maximum(deep[..., 3:], 1)
        deep[..., :3] = np.rint(colour).clip(0, 65535)
    return TURNS.get(image.getexif().get(ORIENTATION), TURNS[1])(deep)
