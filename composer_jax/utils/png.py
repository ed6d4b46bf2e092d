"""PNG files: written whole, told what call they are of, and checked without being decoded."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from composer_jax.utils.atomic import write_bytes

END = b"IEND\xaeB`\x82"
KEY = "composer call"  # of the text that names a call


def save_png(path: Path, image: np.ndarray, tag: str = "") -> None:
    """Writes uint8 [H, W, 3], making folders as needed; `tag` names the call that it is of.

    Raises `WriteError` where the system refuses.
    """
    write_bytes(path, png_bytes(image, tag), sync=False)


def png_bytes(image: np.ndarray, tag: str = "") -> bytes:
    """The content of the file that `save_png` writes."""
    text = PngImagePlugin.PngInfo()
    if tag:
        text.add_text(KEY, tag)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def png_fault(path: Path) -> str | None:
    """What is wrong with a PNG file by its checksums, None for nothing."""
    try:
        with Image.open(path) as image:
            image.verify()
        with path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            if file.read() != END:  # which Pillow does without
                return "its end is missing"
    except Exception as error:  # whatever a broken file makes of itself in there
        return " ".join(str(error).split()) or type(error).__name__
    return None


def png_tag(path: Path) -> str | None:
    """The call that an image file says it is of; None where it says nothing or is no image."""
    try:
        with Image.open(path) as image:
            return image.info.get(KEY)
    except Exception:  # whatever a broken file makes of itself in there
        return None
