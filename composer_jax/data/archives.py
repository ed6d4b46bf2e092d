"""Tar files of images and captions as a source, as webdataset and img2dataset write them."""

from __future__ import annotations

import glob
import io
import logging
import os
import posixpath
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from composer_jax.conditions.image import decode_image
from composer_jax.data.metadata import TABLES, TEXTS, beside, described, some
from composer_jax.data.sources import Crop, Images, image_suffixes

log = logging.getLogger("composer_jax")
LARGEST = 2**30  # bytes of a member that is stored with holes: a few may claim any size
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


class _Place(NamedTuple):
    """Where the content of a member lies; `holes`: (offset, size) of what is stored of it."""

    offset: int
    size: int
    holes: tuple[tuple[int, int], ...] | None


@dataclass(slots=True)
class _Sample:
    """Members of one key: images by name, texts by suffix."""

    images: dict[str, _Place] = field(default_factory=dict)
    texts: dict[str, _Place] = field(default_factory=dict)


class _Example(NamedTuple):
    path: str
    name: str
    image: _Place
    texts: dict[str, _Place]
    caption: tuple[str, Any] | None  # by a table


class Tars(Images):
    """Images of plain tar files, with texts of the same key each: `TEXTS`, or `TABLES` among them.

    A member's key is its name up to the first dot after the last slash, and what follows its field,
    as in webdataset: `a.seg.png` belongs to `a.png` and is no image of its own. Otherwise the files
    give what a folder of their members gives. What a truncated file still holds is used, and the
    log names it.
    """

    def __init__(self, pattern: str, *, size: int, crop: Crop):
        super().__init__(f"tar:{pattern}", size, crop)
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"source tar:{pattern} finds no file; a path with * and ? is wanted")
        if os.path.isdir(pattern):
            raise ValueError(f"source tar:{pattern} is a folder; tar:{pattern}/*.tar is wanted")
        left_out: dict[str, list[str]] = defaultdict(list)
        self._examples = [one for path in paths for one in _Index(path, left_out).examples()]
        self._tell_left_out(len(self._examples), left_out)

    def __len__(self) -> int:
        return len(self._examples)

    def label(self, index: int) -> str:
        """TAR/MEMBER."""
        return f"{self._examples[index].path}/{self._examples[index].name}"

    def load(self, index: int) -> tuple[np.ndarray, list[tuple[str, Any]]]:
        """Image, and what may be its caption; raises ValueError for a broken member."""
        one = self._examples[index]
        try:
            image = decode_image(_content(one.path, one.image), self.label(index))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            named = reason if self.label(index) in reason else f"{self.label(index)} {reason}"
            raise ValueError(named) from error
        candidates = [one.caption] if one.caption else []
        for suffix in sorted(one.texts, key=TEXTS.index):
            read = partial(_text, one.path, suffix, one.texts[suffix])
            candidates.append((_key(one.name)[0] + suffix, read))
        return image, candidates


def _key(name: str) -> tuple[str, str]:
    """(key, field with its dot) of a member."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, dot + suffix


def _content(path: str, place: _Place) -> bytes:
    with open(path, "rb") as file:
        file.seek(place.offset)
        if place.holes is None:
            content = file.read(place.size)
        elif place.size > LARGEST:
            raise ValueError(f"is too large ({place.size} bytes with holes; at most {LARGEST})")
        else:
            content = bytearray(place.size)
            for start, size in place.holes:
                content[start : start + size] = file.read(size)
    if len(content) != place.size:
        raise ValueError("is cut short")
    return bytes(content)


def _text(path: str, suffix: str, place: _Place) -> Any:
    return beside(suffix, _content(path, place))


class _Index:
    """The samples of one tar, by reading its headers; what is of no use goes to `left_out`."""

    def __init__(self, path: str, left_out: dict[str, list[str]]):
        self.path, self.left_out = path, left_out
        self.samples: dict[str, _Sample] = {}
        self.tables: dict[str, _Place] = {}
        self.twice: list[str] = []
        self._suffixes, self._hidden = image_suffixes(), {}

    def examples(self) -> list[_Example]:
        """In the order of the tar. Raises ValueError where it cannot be read at all."""
        try:
            with open(self.path, "rb") as file:
                links = self._members(file)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}") from error
        for name, target in links:
            self._link(name, target)
        if self.twice:
            log.warning("%s holds %s more than once; the last counts, as it does when unpacked",
                        self.path, some(self.twice, "member"))  # fmt: skip
        names = {name for sample in self.samples.values() for name in sample.images}
        tables = {name: partial(self._table, place) for name, place in self.tables.items()}
        found = described(self.path, tables, names)
        return [
            _Example(self.path, name, place, sample.texts, found.captions.get(name))
            for sample in self.samples.values()
            for name, place in sample.images.items()
            if name not in found.aside
        ]

    def _table(self, place: _Place) -> BinaryIO:
        return io.BytesIO(_content(self.path, place))

    def _members(self, file: BinaryIO) -> list[tuple[str, str]]:
        """Sorts all members; returns links as (name, name of what is meant)."""
        links: list[tuple[str, str]] = []
        start = file.read(6)
        file.seek(0)
        if not start:
            log.warning("%s is empty", self.path)
            return []
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for entry in archive:
                    name = posixpath.normpath(entry.name)
                    if entry.isfile():
                        holes = entry.sparse and tuple(entry.sparse)
                        self._take(name, _Place(entry.offset_data, entry.size, holes))
                    elif entry.islnk():
                        links.append((name, posixpath.normpath(entry.linkname)))
                    elif entry.issym():
                        target = posixpath.join(posixpath.dirname(name), entry.linkname)
                        links.append((name, posixpath.normpath(target)))
                    elif not entry.isdir():
                        self.left_out["no file"].append(f"{self.path}/{name}")
                damage = _damage(file, archive.offset)
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as error:
            if not self.samples:
                kind = next((k for mark, k in COMPRESSED.items() if start.startswith(mark)), "")
                reason = f"compressed ({kind})" if kind else "no tar"
                raise ValueError(f"{self.path} is {reason}; plain tar files are wanted, whose "
                                 "members can be read in any order") from error  # fmt: skip
            damage = f"is cut short ({error})"
        if damage:
            count = len(self.samples)
            log.warning("%s %s; %d sample%s used", self.path, damage, count, "s" * (count != 1))
        return links

    def _take(self, name: str, place: _Place) -> None:
        key, suffix = _key(name)
        folder, _, base = name.rpartition("/")
        suffix = suffix.lower()
        if self._is_hidden(folder) or base.startswith("."):
            self.left_out["hidden"].append(f"{self.path}/{name}")
        elif base in TABLES:
            self.tables[name] = place
        elif suffix in self._suffixes or suffix in TEXTS:
            sample = self.samples.setdefault(key, _Sample())
            members, which = (sample.texts, suffix) if suffix in TEXTS else (sample.images, name)
            if which in members:
                self.twice.append(name)
            members[which] = place
        else:
            self.left_out[suffix or "without a suffix"].append(f"{self.path}/{name}")

    def _is_hidden(self, folder: str) -> bool:
        if folder not in self._hidden:
            parts = folder.split("/")
            self._hidden[folder] = any(part.startswith((".", "__")) for part in parts)
        return self._hidden[folder]

    def _link(self, name: str, target: str) -> None:
        """Gives a link what it stands for, where that is in the tar."""
        key, suffix = _key(target)
        sample = self.samples.get(key, _Sample())
        place = sample.images.get(target) or sample.texts.get(suffix.lower())
        if place:
            self._take(name, place)
        else:
            self.left_out["link elsewhere"].append(f"{self.path}/{name}")


def _damage(file: BinaryIO, end: int) -> str:
    """What is wrong behind the last member that was read, if anything."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return "has no end mark, and may be cut short"
    if block.strip(b"\0"):
        return f"is damaged at byte {end}"
    if any(chunk.strip(b"\0") for chunk in iter(partial(file.read, 2**20), b"")):
        return f"has more behind its end mark at byte {end} (tars joined by cat?)"
    return ""
