"""The shards of a cache on disk: each is written whole, then described by notes, and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from composer_jax.utils.atomic import new_file, write_json, writing

SPLIT = "train"


class Damaged(ValueError):
    """A file of a cache is not what was written; the message names it."""


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    """The file of one shard."""
    return folder / f"composer-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def notes_path(folder: Path, shard: int) -> Path:
    """What is known about one shard; it is there when the shard is whole."""
    return folder / "shards" / f"{shard:05d}.json"


def write_shard(
    folder: Path,
    shard: int,
    shards: int,
    examples: Sequence[bytes],
    skipped: Sequence[Mapping[str, str]],
    call: str,
) -> None:
    """Writes a shard, then its notes, each whole or not at all; raises `WriteError`.

    `skipped`: name and reason of each image that is not in it; `call`: a hash of what makes the
    cache. The same examples give the same bytes.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, notes = shard_path(folder, shard, shards), notes_path(folder, shard)
    with new_file(path) as new:
        try:
            writer = ArrayRecordWriter(str(new), "group_size:1")
            for example in examples:
                writer.write(example)
            writer.close()
        except RuntimeError as error:  # as of a full disk
            raise OSError(reason_of(error)) from error
        about = {"count": len(examples), "bytes": new.stat().st_size, "sha256": file_digest(new)}
        about |= {"call": call, "skipped": list(skipped)}
        if _known(folder, shard) not in (None, about):  # else a kill leaves what fits no shard
            with writing(notes):
                notes.unlink()
    write_json(notes, about)


def read_notes(folder: Path, shard: int) -> dict[str, Any]:
    """The notes of a shard: `count`, `bytes`, `skipped` and, unless an older version wrote them,
    `sha256` and `call`.

    Raises FileNotFoundError where there are none, `Damaged` where they are.
    """
    path = notes_path(folder, shard)
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(notes[key], int) and notes[key] >= 0 for key in ("count", "bytes"))
        texts = [one[key] for one in notes["skipped"] for key in ("name", "reason")]
        texts += [notes[key] for key in ("sha256", "call") if key in notes]
        whole = whole and all(isinstance(text, str) for text in texts)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged")
    return notes


def _known(folder: Path, shard: int) -> dict[str, Any] | None:
    """The notes of a shard, {} where they are damaged."""
    try:
        return read_notes(folder, shard)
    except FileNotFoundError:
        return None
    except Damaged:
        return {}


def shard_fault(
    folder: Path, shard: int, shards: int, call: str, *, verify: bool = False
) -> str | None:
    """Why a shard has to be made anew, naming the file; "" where it was never finished, None
    where it is whole.

    Its size is compared with its notes, and with `verify` its content.
    """
    path = shard_path(folder, shard, shards)
    try:
        notes = read_notes(folder, shard)
    except FileNotFoundError:
        return ""
    except Damaged as error:
        return str(error)
    if notes.get("call", call) != call:
        return f"{notes_path(folder, shard)} is of another call"
    if reason := size_fault(path, notes["bytes"]):
        return reason
    try:
        if not verify:
            return None
        if "sha256" in notes:
            wrong = file_digest(path) != notes["sha256"]
            return f"{path} is damaged (its content has changed)" if wrong else None
        faults = (record_fault(path, position, len) for position in range(notes["count"]))
        reason = next(filter(None, faults), None)
    except OSError as error:
        reason = error.strerror or str(error)
    return f"{path} is damaged ({reason})" if reason else None


def size_fault(path: Path, wanted: int) -> str | None:
    """Why a file does not have as many bytes as it should; None where it has."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if not path.is_file():
        return f"{path} is no file"
    return None if found == wanted else f"{path} is damaged ({found} bytes instead of {wanted})"


def record_fault(path: Path, position: int, decode: Callable[[bytes], Any]) -> str | None:
    """Why a record of a shard cannot be read or decoded; None where it can."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        try:
            decode(reader.read([position])[0])
        finally:
            reader.close()
    except Exception as error:  # by array_record or TensorFlow
        return reason_of(error)
    return None


def strange_files(folder: Path, shards: int) -> list[str]:
    """Names of shards and notes in a cache's folder that are none of its own."""
    own = {notes_path(folder, shard) for shard in range(shards)}
    own |= {shard_path(folder, shard, shards) for shard in range(shards)}
    found = {*folder.glob("composer-*.array_record-*"), *folder.glob("shards/*.json")}
    return sorted(path.relative_to(folder).as_posix() for path in found - own)


def reason_of(error: Exception) -> str:
    """An error of a library, in the first line's words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split("; at byte")[0].strip()[:150]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
