"""Sources of images by index: the built-in world, or a folder of one's own."""

from __future__ import annotations

import abc
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.conditions.base import meant
from composer_jax.conditions.image import fit_photo
from composer_jax.data.metadata import first_caption
from composer_jax.utils.values import whole

log = logging.getLogger("composer_jax")
TOLD = 20  # images, skipped or without the caption they should have, that the log names
KINDS_TOLD = 8  # kinds of files that are left out
KINDS = ("scenes", "folder", "tar", "tfds", "cache")


class Source(abc.ABC):
    """Images of one size by index, with what is known about them. `name` says which source."""

    name: str
    size: int
    fields: Mapping[str, str | None] = {}  # which of a dataset's features is what, where it has any

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

    def tell(self) -> None:  # noqa: B027 (most lack nothing)
        """Logs, once, what the examples read so far lacked."""

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
    rest = os.path.expanduser(rest)  # no shell does so behind a colon
    if kind == "folder":
        from composer_jax.data.folders import Folder

        return Folder(Path(rest), size=size, crop=crop)
    if kind == "tar":
        from composer_jax.data.archives import Tars

        return Tars(rest, size=size, crop=crop)
    from composer_jax.data.tfds import Tfds

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
    """Images of anybody's, cropped to squares, with a caption each, "" where there is none.

    One that cannot be read is skipped: `skipped` maps its name to the reason, and the log names the
    first few, as it does for captions that are no text. When all have been read it says how many
    have no caption.
    """

    def __init__(self, name: str, size: int, crop: Crop):
        self.name, self.size, self.crop = name, size, crop
        self.skipped: dict[str, str] = {}
        self._read: np.ndarray | None = None  # which of all
        self._bare: list[int] = []  # images without a caption
        self._wrong = 0  # captions that are no text
        self._told = False

    @property
    def key(self) -> str:
        """A relative path is another elsewhere; the last word says how captions are read."""
        kind, _, rest = self.name.partition(":")
        where = rest if kind == "tfds" else os.path.abspath(rest)
        fields = f" {dict(self.fields)}" if self.fields else ""
        return f"{kind}:{where}{fields} {self.crop} captions-2"

    @abc.abstractmethod
    def label(self, index: int) -> str:
        """What a person calls that image."""

    @abc.abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, Iterable[tuple[str, Any]]]:
        """uint8 [H, W, 3] and what may be its caption, for `first_caption`; raises ValueError where
        the image cannot be read."""

    def batch(self, indices: Sequence[int]) -> dict:
        """Images and captions of those that can be read; decoders run side by side."""

        def one(index: int):
            try:
                image, candidates = self.load(index)
            except ValueError as error:
                return str(error)
            return self.crop(image, self.size, index), *first_caption(candidates)

        indices = [int(index) for index in indices]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(one, indices))
        self._note(indices, found)
        good = [each for each in found if not isinstance(each, str)]
        shape = (len(good), self.size, self.size, 3)
        images = np.stack([image for image, _, _ in good]) if good else np.zeros(shape, np.uint8)
        return {"image": images, "given": {"caption": [caption for _, caption, _ in good]}}

    def _tell_left_out(self, images: int, left_out: Mapping[str, Sequence[str]]) -> None:
        """Logs in one line what is not used, names by kind; raises ValueError without images."""
        kinds = sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0]))
        told = [f"{len(names)} {kind} ({', '.join([*names[:3], *['...'] * (len(names) > 3)])})"
                for kind, names in kinds[:KINDS_TOLD]]  # fmt: skip
        told += [f"{len(kinds) - KINDS_TOLD} more kinds"] * (len(kinds) > KINDS_TOLD)
        if not images:
            held = f"; it has {', '.join(told)}" if told else ""
            raise ValueError(f"source {self.name} holds no image{held}")
        if told:
            log.warning("%s: left out: %s", self.name, ", ".join(told))

    def _note(self, indices: Sequence[int], found: Sequence[str | tuple]) -> None:
        """Keeps and logs what is wrong with images that are read for the first time."""
        if self._read is None:
            self._read = np.zeros(len(self), bool)
        for index, each in zip(indices, found, strict=True):
            if self._read[index]:
                continue
            self._read[index] = True
            if isinstance(each, str):
                self.skipped[self.label(index)] = each
                _say(len(self.skipped), f"skipped {each}", "images that are skipped")
                continue
            _, caption, wrong = each
            if not caption:
                self._bare.append(index)
            for reason in wrong:
                self._wrong += 1
                line = f"{self.label(index)}: no caption from {reason}"
                _say(self._wrong, line, "captions that are no text")
        if self._read.all():
            self.tell()

    def tell(self) -> None:
        """Logs, once, how many of the images read so far have no caption, with three names."""
        if self._bare and not self._told:
            self._told = True
            labels = [self.label(index) for index in self._bare[:3]]
            more = f" and {len(self._bare) - 3} more" if len(self._bare) > 3 else ""
            count = int(self._read.sum()) - len(self.skipped)
            log.warning("%s: %d of %d images have no caption: %s%s",
                        self.name, len(self._bare), count, ", ".join(labels), more)  # fmt: skip


def _say(number: int, line: str, what: str) -> None:
    if number <= TOLD:
        log.warning("%s", line)
    if number == TOLD:
        log.warning("further %s are counted, not named here", what)


@cache
def image_suffixes() -> frozenset[str]:
    """Of the files that Pillow reads here, in lower case: ".png", ".jpg" and some sixty more.

    Formats that it knows by name alone, and those that need a decoder from elsewhere, are left out.
    """
    from PIL import Image, ImageFile

    Image.init()

    def decodes(kind: str) -> bool:
        opener = Image.OPEN[kind][0] if kind in Image.OPEN else ImageFile.StubImageFile
        return not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))

    return frozenset(s for s, kind in Image.EXTENSION.items() if decodes(kind) and kind != "MPEG")
