"""A folder of results says in a JSON file which call they are of, so that only this one goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_jax.utils.atomic import check_writable, write_json
from composer_jax.utils.values import expand_user

log = logging.getLogger("composer_jax")


class Claim:
    """The description of a call in `folder`/`name`: compared at once and written by `write`, or
    at once where it is damaged or gone and the results' tags say that they are this call's.

    `call`: all that decides what the results are, as JSON's types. `results`: what is there of
    files that carry the `tag` of their call, which `tag_of` reads; `more`: names of all else that
    the call writes; `former`: what keys mean that a description may be older than. Raises
    ValueError, naming what differs, where the folder holds results of another call, or of one that
    nothing tells, or cannot be a folder; `WriteError` where nothing can be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        call: Mapping[str, Any],
        *,
        results: Sequence[Path],
        tag_of: Callable[[Path], str | None],
        more: Sequence[str] = (),
        former: Mapping[str, Any] = MappingProxyType({}),
    ):
        check_writable(folder)
        self._path, self._call = folder / name, plain(call)
        text = json.dumps(self._call, sort_keys=True)
        self.tag = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._written = False
        try:
            old = read_claim(self._path)
        except ValueError:  # damaged: see below
            old = None
        if old is not None:
            old = plain(former) | old
            if key := differing(old, self._call):
                raise ValueError(
                    f"{folder} holds results of another {key}{_values(old, self._call, key)}; give "
                    "another --out"
                )
            self._written = True
            return
        unknown = [path for path in results if tag_of(path) != self.tag]
        if not results:
            unknown = [folder / one for one in more if (folder / one).exists()]
        if unknown:
            where = f"{name} is damaged" if self._path.exists() else f"there is no {name}"
            raise ValueError(
                f"{folder} holds {unknown[0].relative_to(folder)} already, and {where}, which says "
                "of which call; give another --out"
            )
        if self._path.exists():
            log.warning("%s is damaged; it is written again", self._path)
        if results:
            self.write()

    def write(self) -> None:
        """Writes the description, where it is not there yet; raises `WriteError`."""
        if not self._written:
            write_json(self._path, self._call)
            self._written = True


def _values(old: Mapping, new: Mapping, key: str) -> str:
    """Both values of a key, where these are short."""
    pair = old.get(key), new.get(key)
    if any(isinstance(value, dict | list) for value in pair):
        return ""
    return f" ({pair[0]!r}, now it is {pair[1]!r})"


def read_claim(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """The call that `path` describes, None where it is not there; "~" in it is expanded.

    Raises ValueError naming the file, and the remedy, where it cannot be read as a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError, IsADirectoryError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, it is no JSON object{remedy and '; ' + remedy}")
    return expand_user(found)


def plain(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as JSON gives it back, so that it can be compared with one that was read."""
    return json.loads(json.dumps(dict(call)))


def differing(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    may: Callable[[str], bool] = lambda key: False,
) -> str | None:
    """The first key, by name, whose value is another one in `new`; `may(key)`: it may be."""
    keys = sorted(old.keys() | new.keys())
    return next((key for key in keys if old.get(key) != new.get(key) and not may(key)), None)
