"""Sources of images by index: the built-in world, or a folder of one's own."""

from __future__ import annotations

import abc
import csv
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from composer_jax.conditions.base import meant
from composer_jax.conditions.image import fit_photo, load_image
from composer_jax.utils.values import whole

log = logging.getLogger("composer_jax")
TOLD = 20  # skipped images that the log names
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
KINDS = ("scenes", "folder", "tar", "tfds", "cache")


class Source(abc.ABC):
    """Images of one size by index, with what is known about them. `name` says which source."""

    name: str
    size: int

    @property
    def key(self) -> str:
        """`name`, and whatever else decides what its images are: pools are kept apart by it."""
        return self.name

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many examples there are, unusable ones included."""

    @abc.abstractmethod
    def batch(self, indices: Sequence[int]) -> dict:
        """`image` uint8 [B, size, size, 3] and `given`, what the source knows, batched (DESIGN 4).

        B is smaller than the number of indices where images cannot be read.
        """

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """Indices of `count` examples at most, from all over the source and in no order: the files
        of a folder are sorted, and neighbours are alike."""
        return np.random.default_rng(seed).permutation(len(self))[:count]


@dataclass(frozen=True)
class Crop:
    """How an image becomes a square: by its centre, or at random; `flip`: every other mirrored.

    What is drawn is a function of `seed` and the image's index.
    """

    random: bool = False
    flip: bool = False
    seed: int = 0

    def __call__(self, image: np.ndarray, size: int, index: int) -> np.ndarray:
        """uint8 [H, W, 3] to [size, size, 3]."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        where, mirrored = rng.random(), rng.random() < 0.5
        image = fit_photo(image, (size, size), where if self.random else 0.5)
        return np.ascontiguousarray(image[:, ::-1]) if self.flip and mirrored else image


def open_source(
    text: str, *, size: int, seed: int = 0, split: str = "train", crop: Crop | None = None
) -> Source:
    """Opens "scenes[:COUNT]", "folder:PATH", "tar:GLOB" or "tfds:NAME[:split]".

    `split` "test" gives scenes of other seeds; other sources have one. `crop`: by default the
    centre. Raises ValueError, one line, for another kind, or one that cannot be opened.
    """
    check_source(text)
    kind, _, rest = text.partition(":")
    if kind == "scenes":
        from composer_jax.data.scenes import Scenes

        if crop and (crop.random or crop.flip):
            raise ValueError("scenes are not cropped or flipped: each is another already, and "
                             "captions say left and right")  # fmt: skip
        return Scenes(int(rest or 12000), size=size, seed=seed, split=split)
    crop = crop or Crop()
    if kind == "folder":
        return Folder(Path(rest), size=size, crop=crop)
    if kind == "tar":
        from composer_jax.data.archives import Tars

        return Tars(rest, size=size, crop=crop)
    from composer_jax.data.archives import Tfds

    return Tfds(rest, size=size, crop=crop)


def check_source(text: str) -> None:
    """Raises ValueError, one line, where `text` is not written as a source is; looks at no file."""
    kind, colon, rest = text.partition(":")
    if kind not in KINDS or kind == "cache":
        allowed = "scenes, scenes:COUNT, folder:PATH, tar:GLOB, tfds:NAME; for training cache:DIR"
        raise ValueError(f"no source {text!r}{meant(kind, KINDS)}; allowed: {allowed}")
    if kind == "scenes" and colon:
        whole(1).parse(f"source {text!r}: the COUNT of scenes:COUNT", rest)
    if kind != "scenes" and not rest.strip():
        raise ValueError(f"source {text!r} lacks what comes after {kind}:")


class Images(Source):
    """Images of anybody's, cropped to squares, with a caption each.

    One that cannot be read is skipped: `skipped` maps its name to the reason, and the log names the
    first few.
    """

    def __init__(self, name: str, size: int, crop: Crop):
        self.name, self.size, self.crop = name, size, crop
        self.skipped: dict[str, str] = {}

    @property
    def key(self) -> str:
        """A relative path is another elsewhere."""
        kind, _, rest = self.name.partition(":")
        where = rest if kind == "tfds" else os.path.abspath(rest)
        return f"{kind}:{where} {self.crop}"

    @abc.abstractmethod
    def label(self, index: int) -> str:
        """What a person calls that image."""

    @abc.abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, str]:
        """uint8 [H, W, 3] and caption; raises ValueError where it cannot be read."""

    def batch(self, indices: Sequence[int]) -> dict:
        """Images and captions of those that can be read; decoders run side by side."""

        def one(index: int):
            try:
                image, caption = self.load(index)
            except ValueError as error:
                return str(error)
            return self.crop(image, self.size, index), caption

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(one, map(int, indices)))
        for index, each in zip(indices, found, strict=True):
            if isinstance(each, str) and self.label(index) not in self.skipped:
                self.skipped[self.label(index)] = each
                if len(self.skipped) <= TOLD:
                    log.warning("skipped %s", each)
                if len(self.skipped) == TOLD:
                    log.warning("further images that are skipped are counted, not named here")
        good = [each for each in found if not isinstance(each, str)]
        shape = (len(good), self.size, self.size, 3)
        images = np.stack([image for image, _ in good]) if good else np.zeros(shape, np.uint8)
        return {"image": images, "given": {"caption": [caption for _, caption in good]}}


class Folder(Images):
    """All images under a folder; captions from files beside them.

    Captions: `metadata.jsonl` or `metadata.csv` with `file_name` and `text`, or a .txt beside an
    image; else empty.
    """

    def __init__(self, folder: Path, *, size: int, crop: Crop = Crop()):
        if not folder.is_dir():
            raise ValueError(f"source folder {folder} does not exist or is no folder")
        super().__init__(f"folder:{folder}", size, crop)
        self.folder = folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(
                f"source folder {folder} holds no image ({', '.join(sorted(SUFFIXES))})"
            )
        self._captions = _metadata(folder)
        known = {p.relative_to(folder).as_posix() for p in self.paths}
        for name in self._captions.keys() - known:
            log.warning("%s names %s, which is not there", folder, name)

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> str:
        """Its path in the folder."""
        return self.paths[index].relative_to(self.folder).as_posix()

    def load(self, index: int) -> tuple[np.ndarray, str]:
        """Image and caption; raises ValueError for a broken file."""
        path, name = self.paths[index], self.label(index)
        image, beside = load_image(path), path.with_suffix(".txt")
        if name in self._captions:
            return image, self._captions[name]
        return image, beside.read_text(errors="replace").strip() if beside.is_file() else ""


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
