"""Sources that others packed: tar files of images and captions, datasets of TFDS."""

from __future__ import annotations

import glob
import json
import logging
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from composer_jax.conditions.image import decode_image, load_image
from composer_jax.data.sources import SUFFIXES, Crop, Images

log = logging.getLogger("composer_jax")
CAPTIONS = ("caption", "captions", "text")  # keys that hold words, in JSON and in TFDS


@dataclass
class _Member:
    """Where the files of one example lie in a tar: (offset, size) by suffix."""

    path: str
    name: str
    image: tuple[int, int] = (0, 0)
    words: dict[str, tuple[int, int]] = field(default_factory=dict)


class Tars(Images):
    """Images of plain tar files, with a .txt or .json of the same stem each (as webdataset has).

    What a truncated file still holds is used, and the log names it.
    """

    def __init__(self, pattern: str, *, size: int, crop: Crop):
        super().__init__(f"tar:{pattern}", size, crop)
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"source tar:{pattern} finds no file; a path with * and ? is wanted")
        self._members = [member for path in paths for member in _index(path)]
        if not self._members:
            raise ValueError(f"source tar:{pattern} holds no image ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._members)

    def label(self, index: int) -> str:
        """TAR/MEMBER."""
        return f"{self._members[index].path}/{self._members[index].name}"

    def load(self, index: int) -> tuple[np.ndarray, str]:
        """Image and caption; raises ValueError for a broken member."""
        member = self._members[index]
        with open(member.path, "rb") as file:

            def read(where: tuple[int, int]) -> bytes:
                file.seek(where[0])
                return file.read(where[1])

            image = decode_image(read(member.image), self.label(index))
            words = {suffix: read(where).decode(errors="replace")
                     for suffix, where in member.words.items()}  # fmt: skip
        if ".txt" in words:
            return image, words[".txt"].strip()
        try:
            known = json.loads(words.get(".json", "{}"))
        except ValueError:
            known = {}
        known = known if isinstance(known, dict) else {}
        return image, next((str(known[key]) for key in CAPTIONS if key in known), "")


def _index(path: str) -> list[_Member]:
    """The examples of one tar, by reading its headers."""
    found: dict[str, _Member] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                stem, suffix = os.path.splitext(entry.name)
                suffix = suffix.lower()
                if not entry.isfile() or PurePosixPath(entry.name).name.startswith("."):
                    continue
                member = found.setdefault(stem, _Member(path, entry.name))
                if suffix in SUFFIXES:
                    member.name, member.image = entry.name, (entry.offset_data, entry.size)
                elif suffix in (".txt", ".json"):
                    member.words[suffix] = (entry.offset_data, entry.size)
    except tarfile.CompressionError as error:
        raise ValueError(f"{path}: {error}") from error
    except tarfile.ReadError as error:
        if not found:
            reason = "compressed, or no tar: plain tar files are wanted, whose members can be"
            raise ValueError(f"{path} is {reason} read in any order") from error
        log.warning("%s is cut short after %d examples (%s)", path, len(found), error)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return [member for member in found.values() if member.image[1]]


class Tfds(Images):
    """A dataset of TensorFlow Datasets, stored as ArrayRecord: its image and its caption or label.

    `text`: NAME[:split], or the folder of a prepared one.
    """

    def __init__(self, text: str, *, size: int, crop: Crop):
        from composer_jax.data.tensorflow import tfds

        super().__init__(f"tfds:{text}", size, crop)
        name, _, split = text.partition(":")
        library = tfds()
        try:
            if Path(name).is_dir():
                builder = library.builder_from_directory(name)
            else:
                builder = library.builder(name)
            self._rows = builder.as_data_source(split=split or "train")
        except Exception as error:  # the library raises whatever it likes
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise ValueError(
                f"source tfds:{text}: {type(error).__name__} {reason}; a dataset that is prepared "
                "as array_record is wanted, by its name or its folder, and one of its splits"
            ) from error
        features = builder.info.features
        images = [k for k, f in features.items() if isinstance(f, library.features.Image)]
        if not images:
            raise ValueError(f"source tfds:{text} has no image; it has {', '.join(features)}")
        self._image = images[0]
        self._words = next((k for k in CAPTIONS if k in features), None)
        labels = [k for k, f in features.items() if isinstance(f, library.features.ClassLabel)]
        self._label = labels[0] if labels and not self._words else None
        self._names = features[self._label].names if self._label else ()

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, index: int) -> str:
        """Its number."""
        return f"example {index}"

    def load(self, index: int) -> tuple[np.ndarray, str]:
        """Image and caption; raises ValueError for a broken record."""
        try:
            row = self._rows[index]
        except Exception as error:
            raise ValueError(f"example {index}: {error}") from error
        image = load_image(np.asarray(row[self._image]))
        if self._label:
            return image, self._names[int(row[self._label])].replace("_", " ")
        words = row[self._words] if self._words else ""
        while isinstance(words, list | tuple | np.ndarray) and not np.isscalar(words):
            words = words[0] if len(words) else ""
        return image, words.decode() if isinstance(words, bytes) else str(words)
