"""Captions as people and other libraries write them: values, files beside images, tables."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import math
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

log = logging.getLogger("composer_jax")
CAPTIONS = ("caption", "captions", "text")  # keys that hold words, the first one that does counts
TEXTS = (".txt", ".text", ".caption", ".json", ".jsn")  # files beside an image, in this order
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# what pandas, and so Hugging Face's imagefolder, reads as missing in a CSV
MISSING = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
           "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}  # fmt: skip
MARKS = (  # byte order marks; UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def first_caption(candidates: Iterable[tuple[str, Any]]) -> tuple[str, list[str]]:
    """The first caption among (where, value), or "", and what is wrong with those before it.

    A value is text, which is trimmed, or bytes of it; of a list the first caption counts, of a dict
    the one under `CAPTIONS`; None, NaN and empty text are no caption. It may be a function that
    gives such a value or raises ValueError. Whatever else it is, the second result says.
    """
    wrong: list[str] = []
    return _first(candidates, wrong), wrong


def _first(candidates: Iterable[tuple[str, Any]], wrong: list[str]) -> str:
    for where, value in candidates:
        try:
            caption = _caption(where, value() if callable(value) else value, wrong)
        except ValueError as error:
            wrong.append(f"{where} {error}")
        except OSError as error:
            wrong.append(f"{where} cannot be read: {error.strerror}")
        else:
            if caption:
                return caption
    return ""


def _caption(where: str, value: Any, wrong: list[str]) -> str:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        value = decoded(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no text") from None
        return value.lstrip("\ufeff").strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return _first(((where, each) for each in value), wrong)
    if isinstance(value, Mapping) and (held := captions_of(value)):
        return _first(((f"{where} {key}", each) for key, each in held.items()), wrong)
    keys = f" without {' or '.join(CAPTIONS)}" if isinstance(value, Mapping) else ""
    raise ValueError(f"is {type(value).__name__}{keys} ({str(value)[:40]}), not text")


def decoded(content: bytes) -> str:
    """Text in UTF-8, or in what its byte order mark says; raises ValueError where it is neither."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"is not {name} ({byte}); text in UTF-8 is wanted") from None


def beside(suffix: str, content: bytes) -> Any:
    """What a file of `TEXTS` beside an image holds, for `first_caption`; `suffix` in lower case.

    Raises ValueError where it is no text, or not the JSON that its suffix says.
    """
    text = decoded(content)
    if suffix not in (".json", ".jsn"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    return captions_of(value) if isinstance(value, dict) else value


def captions_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a row holds under `CAPTIONS`; None where it has none of them."""
    return {key: row[key] for key in CAPTIONS if key in row} or None


@dataclass
class Described:
    """What tables say: values for `first_caption` by file, and files that are no images but belong
    to one (named by `depth_file_name` and the like)."""

    captions: dict[str, tuple[str, Any]] = field(default_factory=dict)
    aside: set[str] = field(default_factory=set)


def described(
    source: str, tables: Mapping[str, Callable[[], BinaryIO]], files: Collection[str]
) -> Described:
    """Reads the tables of a source; their names and those of `files` are relative to its top.

    A table names files relative to its own folder, as in Hugging Face's imagefolder; the nearest
    table counts, and of its rows the first. Raises ValueError for a table that cannot be read, and
    where one folder has two.
    """
    folders = [posixpath.dirname(table) for table in tables]
    for folder in sorted(set(folders)):
        if folders.count(folder) > 1:
            two = sorted(table for table in tables if posixpath.dirname(table) == folder)
            raise ValueError(f"{source} has {' and '.join(two)}; only one of them can count")
    found, absent, twice = Described(), [], []
    for table in sorted(tables, key=lambda name: (-name.count("/"), name)):
        columns: dict[str, None] = {}
        try:
            with tables[table]() as file:
                for row, image, more in _rows(table, file):
                    name = _resolved(table, image, files)
                    found.aside |= {_resolved(table, one, files) for one in more}
                    columns |= dict.fromkeys(row)
                    if name not in files:
                        absent.append(name)
                    elif name in found.captions:
                        twice.append(name)
                    else:
                        found.captions[name] = table, captions_of(row)
        except (ValueError, OSError) as error:
            raise ValueError(f"{source}: {table}: {' '.join(str(error).split())}") from error
        if columns and not any(key in columns for key in CAPTIONS):
            log.warning("%s: %s has no %s, and so no captions; it has %s",
                        source, table, " or ".join(CAPTIONS), ", ".join(columns))  # fmt: skip
    found.aside -= found.captions.keys()
    if absent:
        log.warning("%s: metadata names %s, not there", source, some(absent, "file"))
    if twice:
        log.warning("%s: metadata names %s more than once; the first row counts",
                    source, some(twice, "file"))  # fmt: skip
    return found


def some(names: Iterable[str], what: str, most: int = 3) -> str:
    """ "5 files (a, b, c and 2 more)"; `what` in the singular."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}{'s' * (len(names) != 1)} ({', '.join(names[:most])}{more})"


def _resolved(table: str, name: str, files: Collection[str]) -> str:
    """The file that a table means, relative to the source."""
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
    if joined not in files and "\\" in joined:  # written under Windows
        return posixpath.normpath(joined.replace("\\", "/"))
    return joined


def _rows(table: str, file: BinaryIO) -> Iterator[tuple[dict[str, Any], str, list[str]]]:
    """(row, the image it names, further files it names) of every row of a table."""
    read = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[posixpath.splitext(table)[1]]
    for where, row in read(file):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is wanted, not {str(row)[:40]}")
        names = [key for key in row if key == "file_name" or key.endswith("_file_name")]
        key = next((one for one in ("file_name", "image_file_name") if one in names), None)
        if key is None and len(names) == 1:
            key = names[0]
        if key is None:
            reason = "needs file_name or image_file_name"
            if names:
                reason = f"which of {', '.join(sorted(names))} is the image? it {reason}"
            raise ValueError(f"{where} {reason}; it has {', '.join(row)}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"{where}: {key} is {row[key]!r}; the name of a file is wanted")
        more = [row[one] for one in names if one != key and isinstance(row[one], str)]
        yield row, row[key], [one for one in more if one]


def _jsonl(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(decoded(file.read()).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON ({error})") from None


def _csv(file: BinaryIO) -> Iterator[tuple[str, dict]]:
    lines = io.StringIO(decoded(file.read()), newline="")
    rows = csv.reader(lines, strict=True, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(rows, ())]
        if len(set(names)) < len(names):
            raise ValueError(f"names a column twice: {', '.join(names)}")
        for row in filter(None, rows):
            if len(row) > len(names):
                raise ValueError(
                    f"line {rows.line_num}: {len(row)} values for {len(names)} columns; text that "
                    'holds a comma needs quotes: "a dog, on a lawn"'
                )
            values = (None if value in MISSING else value for value in row)
            found = dict(zip(names, values, strict=False))
            yield f"line {rows.line_num}", dict.fromkeys(names) | found
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None


def _parquet(file: BinaryIO) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        wanted = [n for n in names if n in CAPTIONS or n == "file_name" or n.endswith("_file_name")]
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"row {number}", {**dict.fromkeys(names), **row}
    except pyarrow.ArrowException as error:
        raise ValueError(f"is not Parquet ({error})") from error
