"""A folder of images as a source, with captions from files beside them and from tables."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.conditions.image import load_image
from composer_jax.data.metadata import TABLES, TEXTS, beside, described
from composer_jax.data.sources import Crop, Images, image_suffixes
from composer_jax.storage.series import CALL, RESULT
from composer_jax.utils.owned import MANIFEST, written


class Folder(Images):
    """All images under a folder but hidden ones; links to folders are followed, each once.

    What commands wrote there is left out: conditions, grids, and samples unless there is nothing
    else.

    Captions: `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in any of its folders, with
    `file_name` and one of `CAPTIONS`; where these say nothing, a file of `TEXTS` beside the image.
    """

    def __init__(self, folder: Path, *, size: int, crop: Crop):
        if not folder.is_dir():
            raise ValueError(f"source folder {folder} does not exist or is no folder")
        super().__init__(f"folder:{folder}", size, crop)
        self.folder = folder
        files, left_out = _files(folder)
        if ours := _written(folder, files):
            left_out["written by composer"] = sorted(ours)
            files = dict.fromkeys(name for name in files if name not in ours)
        tables = {name: partial(open, folder / name, "rb")
                  for name in files if name.rpartition("/")[2] in TABLES}  # fmt: skip
        found, suffixes = described(self.name, tables, files), image_suffixes()
        self._captions, self._names, rest = found.captions, [], []
        for name in files:
            is_image = os.path.splitext(name)[1].lower() in suffixes and name not in found.aside
            (self._names if is_image or name in found.captions else rest).append(name)
        stems = {os.path.splitext(name)[0] for name in self._names}
        self._beside: dict[str, list[str]] = defaultdict(list)
        for name in rest:
            stem, suffix = os.path.splitext(name)
            if name in found.aside:
                left_out["of other images by metadata"].append(name)
            elif suffix.lower() in TEXTS and stem in stems:
                self._beside[stem].append(suffix)
            elif name not in tables:
                left_out[suffix.lower() or "without a suffix"].append(name)
        self._tell_left_out(len(self._names), left_out)

    def __len__(self) -> int:
        return len(self._names)

    def label(self, index: int) -> str:
        """Its path in the folder."""
        return self._names[index]

    def load(self, index: int) -> tuple[np.ndarray, list[tuple[str, Any]]]:
        """Image, and what may be its caption; raises ValueError for a broken file."""
        name = self._names[index]
        image, stem = load_image(self.folder / name), os.path.splitext(name)[0]
        candidates = [self._captions[name]] if name in self._captions else []
        texts = self._beside.get(stem, ())
        for suffix in sorted(texts, key=lambda suffix: (TEXTS.index(suffix.lower()), suffix)):
            candidates.append((stem + suffix, partial(self._text, stem + suffix)))
        return image, candidates

    def _text(self, name: str) -> Any:
        return beside(os.path.splitext(name)[1].lower(), (self.folder / name).read_bytes())


def _written(folder: Path, files: Mapping[str, None]) -> set[str]:
    """Images that commands wrote: those that they list; samples, where there is anything else."""
    images = {name for name in files if os.path.splitext(name)[1].lower() in image_suffixes()}
    listed, results = set(), set()
    for name in files:
        prefix, last = name[: name.rfind("/") + 1], name.rpartition("/")[2]
        if last == MANIFEST:
            listed |= {prefix + one for one in written(folder / prefix)}
        elif RESULT.fullmatch(last) and prefix + CALL in files:
            results.add(name)
    listed &= images
    return listed | results if images - listed - results else listed


def _files(folder: Path) -> tuple[dict[str, None], dict[str, list[str]]]:
    """The files under a folder by their paths in it, sorted, and what is left out, by reason.

    Links to folders come after the others, so that what is there twice has its plain name.
    """
    found: list[str] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    folders, links, seen = [("", os.path.realpath(folder))], [], set()
    while folders or links:
        prefix, path = folders.pop() if folders else links.pop(0)
        if path in seen:
            left_out["linked again"].append(prefix)
            continue
        seen.add(path)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            left_out[f"unreadable: {error.strerror}"].append(prefix)
            continue
        for entry in entries:
            name = prefix + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if entry.name.startswith((".", "__") if is_folder else "."):
                left_out["hidden"].append(name + "/" * is_folder)
            elif is_folder and entry.is_symlink():
                links.append((name + "/", os.path.realpath(entry.path)))
            elif is_folder:
                folders.append((name + "/", entry.path))
            elif is_file:
                found.append(name)
            else:
                left_out["broken link" if entry.is_symlink() else "no file"].append(name)
    return dict.fromkeys(sorted(found, key=lambda name: name.split("/"))), left_out
