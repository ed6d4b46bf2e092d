"""Folders of ours: a list of what we wrote, so that nothing else is ever removed or replaced.

`composer-files.json` in a folder names each file that was written there, with its size and a
checksum of its beginning. What it does not name, or what has changed since, is not ours.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from composer_jax.utils.atomic import new_folder, write_bytes, write_json

log = logging.getLogger("composer_jax")
MANIFEST = "composer-files.json"
BEGINNING = 2**20  # bytes that a checksum is of; a safetensors file of ours begins with all of its
SHOWN = 3  # names in a message


def record(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Notes that we wrote `files`, or everything under `folder`, as it is now."""
    if files is None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    marks = {
        path.relative_to(folder).as_posix(): _mark(path) for path in files if path.name != MANIFEST
    }
    old = _listed(folder)
    if {**old, **marks} != old:
        write_json(folder / MANIFEST, {"format": 1, "files": {**old, **marks}})


def foreign(folder: Path) -> list[str]:
    """What is in `folder`, or under it, that we did not write or that has changed since."""
    ours: dict[Path, list[int]] = {}
    for manifest in folder.rglob(MANIFEST):
        ours |= {manifest.parent / name: mark for name, mark in _listed(manifest.parent).items()}
        if _listed(manifest.parent):
            ours[manifest] = _mark(manifest)
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if not _is_folder(path) and (not _is_plain(path) or ours.get(path) != _mark(path))
    ]


def written(folder: Path) -> set[str]:
    """The files in `folder` that its list names and that are still as we wrote them."""
    return {
        name
        for name, mark in _listed(folder).items()
        if _is_plain(folder / name) and _mark(folder / name) == mark
    }


def check_ours(path: Path, files: Iterable[str] | None = None) -> None:
    """Raises ValueError where replacing the folder `path`, or `files` in it, would lose what we
    did not write; a message names it."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is wanted")
    others = foreign(path)
    if files is not None:
        others = sorted(set(others) & set(files))
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise ValueError(
            f"{path} holds {', '.join(others[:SHOWN])}{more}, which composer did not write or "
            "which has changed since; it stays as it is: give another folder, or move it away"
        )


def adopt(folder: Path) -> None:
    """Lists all that is in a folder that we wrote before there were lists."""
    if folder.is_dir() and not (folder / MANIFEST).exists():
        record(folder)


def check_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Raises ValueError where `write_files` would."""
    names = [name for name, content in contents.items() if not _holds(folder / name, content)]
    check_ours(folder, names)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files by their name in `folder`, each whole or not at all, and lists them.

    What is there with the same content stays. Raises ValueError, before anything is written, where
    a file is there that we did not write, `WriteError` where the system refuses.
    """
    check_files(folder, contents)
    for name, content in contents.items():
        if not _holds(folder / name, content):
            write_bytes(folder / name, content, sync=False)
    record(folder, [folder / name for name in contents])


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def check_not_read(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises ValueError where an output is an input; links count as what they lead to."""
    if os.path.realpath(out) in map(os.path.realpath, inputs):
        raise ValueError(f"{out} is what is read; give another place to write to")


def check_apart(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raises ValueError where an output is an input, lies in one, or holds one; links count as
    what they lead to. An input that does not exist, as a hub's name, is passed over."""
    for given in inputs:
        there = Path(os.path.realpath(given))
        for out in outputs if there.exists() else ():
            place = Path(os.path.realpath(out))
            check_not_read(out, [given])
            if place.is_relative_to(there):
                raise ValueError(f"{out} lies in {given}, which is read; give another place")
            if there.is_relative_to(place):
                raise ValueError(f"{out} holds {given}, which is read; give another place")


def check_replaceable(folder: Path, *, keep: bool = False) -> None:
    """Raises ValueError where `replaced_folder` would."""
    folder = Path(os.path.realpath(folder))
    if folder.is_dir() and (os.path.ismount(folder) or Path.cwd().is_relative_to(folder)):
        raise ValueError(f"{folder} is a mount, or the current folder; give a folder inside it")
    if not keep:
        check_ours(folder)


@contextmanager
def replaced_folder(folder: Path, *, keep: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of `folder` with a list of its files.

    What we did not write there raises ValueError, before and after; with `keep` it stays beside
    what is new, as NAME.kept where that has the same name. Raises `WriteError` where the system
    refuses; then `folder` is as it was.
    """
    folder = Path(os.path.realpath(folder))
    check_replaceable(folder, keep=keep)
    with new_folder(folder, replace=True) as new:
        yield new
        record(new)
        if not keep:
            check_ours(folder)
        elif folder.is_dir():
            _carry(folder, new)


def _carry(old: Path, new: Path) -> None:
    """Links what we did not write in `old` into `new`: under its name, or NAME.kept."""
    listed = _listed(old)
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        ours = _is_plain(path) and listed.get(name) == _mark(path)
        if ours or _is_folder(path) or (path.name == MANIFEST and (new / name).exists()):
            continue
        place = new / name
        for number in itertools.count():
            if not os.path.lexists(place):
                break
            place = new / f"{name}.kept{number or ''}"
        if place != new / name:
            log.warning("%s was changed by others; what was there is now %s", path, place.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        link(path, place)


def link(source: Path | str, target: Path | str) -> None:
    """Makes `target` the same file as `source`, or a copy where links are not possible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target, follow_symlinks=False)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _listed(folder: Path) -> dict[str, list[int]]:
    """What the list of a folder names; nothing where there is none, or none that can be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): list(mark) for name, mark in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _mark(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [path.stat().st_size, zlib.crc32(file.read(BEGINNING))]
