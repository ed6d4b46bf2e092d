"""Image files decoded: by Pillow, and by OpenCV where Pillow drops bits."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
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
            deep = _deep(image, layout, file, path)
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


def _deep(image, layout: str, file, path: str) -> np.ndarray | None:
    """The numbers of an image that has no 8 bits a channel, turned as EXIF says; else None.

    Of 16 bits in colour Pillow keeps the upper 8, or rounds them and turns white into black
    (JPEG 2000), so OpenCV reads them.
    """
    from PIL import ImageOps

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(ImageOps.exif_transpose(image))
        if image.format == "PPM" and image.mode == "I":  # 16 bits, which Pillow has widened
            values = values.astype(np.uint16)
        if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
            values = np.uint16(65535) - values  # white is zero
        clear = image.info.get("transparency")
        if not isinstance(clear, int):
            return values
        return np.stack([values, np.where(values == clear, 0, 65535).astype(values.dtype)], axis=-1)
    jpeg2000 = image.format == "JPEG2000"
    if not (jpeg2000 or ";16" in layout) or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    bits = _bits_of_jpeg2000(content) if jpeg2000 else 16
    if bits <= 8:
        return None
    import cv2

    deep = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.ndim != 3 or deep.dtype != np.uint16 or deep.shape[2] < 3:
        if jpeg2000:
            raise ValueError(f"{path} holds {bits} bits in a layout that cannot be read; save it "
                             "as plain RGB or RGBA, or with 8 bits")  # fmt: skip
        return None
    if bits < 16:
        deep = np.rint(deep * (65535.0 / (2**bits - 1))).clip(0, 65535).astype(np.uint16)
    alpha = deep.shape[2] == 4 and image.has_transparency_data
    deep = deep[..., [2, 1, 0, 3][: 3 + alpha]]
    if layout.startswith("RGBa"):  # colours were multiplied by alpha
        colour = deep[..., :3] * 65535.0 / np.maximum(deep[..., 3:], 1)
        deep[..., :3] = np.rint(colour).clip(0, 65535)
    return TURNS.get(image.getexif().get(ORIENTATION), TURNS[1])(deep)


def _bits_of_jpeg2000(content: bytes) -> int:
    """Bits of the deepest channel, from the codestream's SIZ segment (ISO/IEC 15444-1, A.5.1)."""
    start = content.find(b"\xff\x4f\xff\x51") + 4  # behind the markers SOC and SIZ
    count = int.from_bytes(content[start + 36 : start + 38], "big")
    return max(((byte & 127) + 1 for byte in content[start + 38 :: 3][:count]), default=8)
