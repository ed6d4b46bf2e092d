"""Files and folders that are written whole or not at all.

What is being written has a hidden name beside its place, `.NAME.TAG.part`, is synced to disk and
then moved there. An error leaves nothing of it, a kill at most that hidden file, which the next
process that writes there removes. Errors of the system name the path and its file system.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-\d+\.(?:part|old)")
ABANDONED = 86400  # seconds after which what another machine was writing counts as left behind
_numbers = itertools.count()


class WriteError(OSError):
    """Something could not be written; the message names the path and its file system."""

    def __init__(self, path: Path, error: OSError):
        reason = error.strerror or " ".join(str(error).split())
        super().__init__(f"{path} cannot be written: {reason} ({_file_system(path)})")
        self.path, self.error, self.errno = path, error, error.errno


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of its block into a `WriteError` of `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


@contextmanager
def new_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Gives the path of a file to write, which takes the place of `path` when all went well.

    Makes missing parent folders. `sync=False`: not for a crash of the machine, for what is made
    again cheaply. Raises `WriteError` where the system refuses; then `path` is as it was.
    """
    given, path = path, Path(os.path.realpath(path))  # a link stays, its target is replaced
    if given.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout
        with writing(given):
            yield given
        return
    with writing(path), _made_folders(path.parent):
        part = _part(path)
        try:
            yield part
            if sync:
                _sync(part)
            os.replace(part, path)
            if sync:
                _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview, *, sync: bool = True) -> None:
    """Writes a file whole or not at all; raises `WriteError`."""
    with new_file(path, sync=sync) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Writes UTF-8 text whole or not at all; raises `WriteError`."""
    write_bytes(path, text.encode(), sync=sync)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, whole or not at all; raises `WriteError`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def append_bytes(path: Path, content: bytes) -> None:
    """Appends to a file whole or not at all; raises `WriteError`."""
    with writing(path), path.open("ab", buffering=0) as file:
        size, left = os.fstat(file.fileno()).st_size, memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `folder` when all went well.

    `folder` must not exist, or be empty, unless `replace` is set by a caller that knows that all
    in it may go (`utils.owned.replaced_folder`). Raises `WriteError` where the system refuses;
    then `folder` is as it was.
    """
    folder = Path(os.path.realpath(folder))
    with writing(folder), _made_folders(folder.parent):
        part = _part(folder)
        old = part.with_suffix(".old")
        part.mkdir()
        try:
            yield part
            sync_tree(part)
            if replace and folder.exists():
                os.rename(folder, old)
            try:
                os.rename(part, folder)
            except OSError:
                if old.exists():
                    os.rename(old, folder)
                raise
            _sync(folder.parent)
        except WriteError as inner:  # it is named as the user knows it
            if not inner.path.is_relative_to(part):
                raise
            raise WriteError(folder / inner.path.relative_to(part), inner.error) from inner
        finally:
            _remove(part)
        _remove(old)


def sync_tree(folder: Path) -> None:
    """Waits until all files under `folder` are on disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _sync(path)


def check_writable(path: Path) -> None:
    """Raises, and leaves nothing, where no file could be made in the folder `path`, which need
    not exist yet: ValueError where it or a parent is a file, `WriteError` where the system
    refuses."""
    if not str(path) or "\0" in str(path):
        raise ValueError(f"{str(path)!r} is no path")
    with writing(path):
        there = Path(os.path.realpath(path))
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            raise ValueError(f"{path} cannot be a folder: {there} is a file")
        with tempfile.TemporaryFile(dir=there):
            pass


def _exists(path: Path) -> bool:
    """Whether something is there; raises OSError for a name that cannot be, as one too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def _made_folders(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; on an error those that it made go again, if empty."""
    made = []
    for one in (folder, *folder.parents):
        if one.exists():
            break
        made.append(one)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for one in made:
                one.rmdir()
        raise


def _part(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses, nothing being there."""
    _clean(path.parent)
    part = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{next(_numbers)}.part")
    _remove(part)  # of a machine of the same name whose processes have the same numbers
    return part


@functools.cache  # once a process: there may be many files
def _clean(folder: Path) -> None:
    """Removes what killed processes left; a folder that was being replaced comes back."""
    with contextlib.suppress(OSError):  # of another user
        for left in list(folder.iterdir()):
            match = PART.fullmatch(left.name)
            if match and _abandoned(left, host=match[2], process=match[3]):
                place = folder / match[1]
                if left.suffix == ".old" and not place.exists():
                    left.rename(place)
                else:
                    _remove(left)


def _abandoned(left: Path, host: str, process: str) -> bool:
    if host == _host():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except OSError:  # of another user, and alive
            pass
        return False
    with contextlib.suppress(OSError):
        return left.stat().st_mtime < time.time() - ABANDONED
    return False


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _remove(left: Path) -> None:
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP):
            return  # a file system that syncs no folders
        raise
    finally:
        os.close(handle)


def _file_system(path: Path) -> str:
    """Where a path is mounted, of which type, how much room is left."""
    there = Path(os.path.realpath(path))
    while not os.path.exists(there):
        there = there.parent
    left = os.statvfs(there)
    room = f"{left.f_bavail * left.f_frsize / 2**20:,.1f} MiB free"
    if left.f_files and not left.f_favail:
        room += ", but no inode for another file"
    while not os.path.ismount(there):
        there = there.parent
    kinds = {}
    with contextlib.suppress(OSError):  # Linux's
        lines = Path("/proc/mounts").read_text().splitlines()
        kinds = {line.split()[1]: f", {line.split()[2]}" for line in lines}
    return f"file system {there}{kinds.get(str(there), '')}, {room}"
