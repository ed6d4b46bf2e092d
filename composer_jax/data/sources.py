"""Sources of images by index: the built-in world, or a folder of one's own."""

from __future__ import annotations

import abc
import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from composer_jax.conditions.base import meant
from composer_jax.conditions.image import load_image

log = logging.getLogger("composer_jax")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
KINDS = ("scenes", "folder")


class Source(abc.ABC):
    """Images of one size by index, with what is known about them. `name` says which source."""

    name: str
    size: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many examples there are, unusable ones included."""

    @abc.abstractmethod
    def batch(self, indices: Sequence[int]) -> dict:
        """`image` uint8 [B, size, size, 3] and `given`, what the source knows, batched (DESIGN 4).

        B is smaller than the number of indices where images cannot be read.
        """


def open_source(text: str, *, size: int, seed: int = 0, split: str = "train") -> Source:
    """Opens "scenes", "scenes:COUNT" or "folder:PATH".

    `split` "test" gives scenes of other seeds; a folder has one split. Raises ValueError, one line,
    for another kind, a count that is none, a missing or empty folder.
    """
    kind, _, rest = text.partition(":")
    if kind == "scenes":
        from composer_jax.data.scenes import Scenes

        if rest and not (rest.isdigit() and int(rest) > 0):
            raise ValueError(f"source {text!r}: scenes:COUNT takes a positive whole number")
        return Scenes(int(rest or 12000), size=size, seed=seed, split=split)
    if kind == "folder":
        return Folder(Path(rest), size=size)
    allowed = "scenes, scenes:COUNT, folder:PATH"
    raise ValueError(f"no source {text!r}{meant(kind, KINDS)}; allowed: {allowed}")


class Folder(Source):
    """All images under a folder, cropped to squares; captions from files beside them.

    Captions: `metadata.jsonl` or `metadata.csv` with `file_name` and `text`, or a .txt beside an
    image; else empty. An image that cannot be read is skipped: `skipped` maps its path to the
    reason, and the log names it once.
    """

    def __init__(self, folder: Path, *, size: int):
        if not folder.is_dir():
            raise ValueError(f"source folder {folder} does not exist or is no folder")
        self.name, self.size, self.folder = f"folder:{folder}", size, folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(
                f"source folder {folder} holds no image ({', '.join(sorted(SUFFIXES))})"
            )
        self._captions = _metadata(folder)
        self.skipped: dict[Path, str] = {}
        known = {p.relative_to(folder).as_posix() for p in self.paths}
        for name in self._captions.keys() - known:
            log.warning("%s names %s, which is not there", folder, name)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Sequence[int]) -> dict:
        """Images and captions of those that can be read."""
        images, captions = [], []
        for path in (self.paths[i] for i in indices):
            try:
                images.append(square(load_image(path), self.size))
            except ValueError as error:
                if path not in self.skipped:
                    self.skipped[path] = str(error)
                    log.warning("skipped %s (%d so far)", error, len(self.skipped))
                continue
            captions.append(self._caption(path))
        shape = (len(images), self.size, self.size, 3)
        stacked = np.stack(images) if images else np.zeros(shape, np.uint8)
        return {"image": stacked, "given": {"caption": captions}}

    def _caption(self, path: Path) -> str:
        name = path.relative_to(self.folder).as_posix()
        beside = path.with_suffix(".txt")
        if name in self._captions:
            return self._captions[name]
        return beside.read_text(errors="replace").strip() if beside.is_file() else ""


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of uint8 [H, W, 3], resized to [size, size, 3] with antialiasing."""
    from PIL import Image

    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(crop.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0))


def _metadata(folder: Path) -> dict[str, str]:
    """file_name -> text of metadata.jsonl or metadata.csv; raises ValueError for a broken one."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    path = lines if lines.is_file() else table
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        elif table.is_file():
            rows = list(csv.DictReader(table.read_text().splitlines()))
        else:
            return {}
        return {row["file_name"]: str(row["text"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{path}: every row needs file_name and text ({reason})") from None
