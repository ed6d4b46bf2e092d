"""A folder of results says in a JSON file which call they are of, so that only this one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read_claim(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """The call that `path` describes, None where it is not there.

    Raises ValueError naming the file, and the remedy, where it cannot be read as a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, it is no JSON object{remedy and '; ' + remedy}")
    return found


def plain(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as JSON gives it back, so that it can be compared with one that was read."""
    return json.loads(json.dumps(call))


def differing(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    may: Callable[[str], bool] = lambda key: False,
) -> str | None:
    """The first key, by name, whose value is another one in `new`; `may(key)`: it may be."""
    keys = sorted(old.keys() | new.keys())
    return next((key for key in keys if old.get(key) != new.get(key) and not may(key)), None)
