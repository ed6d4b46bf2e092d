"""What a value may be: a check, and the words that a message says it with."""

from __future__ import annotations

import difflib
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1  # of what is counted: steps are int32
LARGEST_SEED = 2**63 - 1
SHOWN = 80  # characters of a wrong value that a message repeats


@dataclass(frozen=True)
class Allowed:
    """Which values are allowed, and how one is read from text.

    `wanted`: in words; `holds(value)`: whether it is allowed; `read(text)` raises ValueError for
    text that is no such value; `choices`: the words that are allowed, where these are few.
    """

    wanted: str
    holds: Callable[[Any], bool]
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()

    def check(self, what: str, value: Any) -> None:
        """Raises ValueError, naming `what`, the value and what is allowed, for any other value."""
        if not self.holds(value):
            near = str(value) if self.choices else ""
            close = difflib.get_close_matches(near, self.choices, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{what} is {shown(value)}{hint}; {self.wanted} is wanted")

    def parse(self, what: str, text: str) -> Any:
        """The value that `text` says; raises ValueError as `check` does."""
        try:
            value = self.read(text)
        except ValueError:
            value = text
        self.check(what, value)
        return value


def shown(value: Any) -> str:
    """A value in a message: its repr in one line, cut where it is long."""
    try:
        text = re.sub(r"\n\s*", " ", repr(value))
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def expand_user(value: Any) -> Any:
    """Texts with the home folder for "~" where a path may begin: first, or after "=" or ":", which
    no shell expands. Lists and dicts as they are, with such texts."""
    if isinstance(value, str):
        return re.sub(r"(?<![^=:])~[\w.-]*(?=/|$)", lambda m: os.path.expanduser(m[0]), value)
    if isinstance(value, dict):
        return {key: expand_user(one) for key, one in value.items()}
    return [expand_user(one) for one in value] if isinstance(value, list) else value


def whole(least: int, most: int = MOST) -> Allowed:
    """Whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,40}", text.strip()):
            raise ValueError(text)
        return int(text)

    def holds(value: Any) -> bool:
        counts = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return counts and least <= value <= most

    return Allowed(f"a whole number from {least} to {most}", holds, read)


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Allowed:
    """Finite numbers from `low` to `high`; `above`, `below`: these themselves excluded."""
    words = f"from {low:g} to {high:g}"
    if above or below:
        least, most = "above" if above else "at least", "below" if below else "at most"
        words = f"{least} {low:g}, {most} {high:g},"

    def holds(value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        inside = low <= value <= high  # nan is not
        return inside and not (above and value == low) and not (below and value == high)

    return Allowed(f"a number {words}", holds, float)


def choice(*words: str) -> Allowed:
    """One of a few words."""
    return Allowed(f"one of {', '.join(words)}", lambda value: value in words, choices=words)


def text(*, empty: bool = False) -> Allowed:
    """Text; `empty`: also none. Line ends and NUL are in no name of a file or model."""

    def holds(value: Any) -> bool:
        if not isinstance(value, str) or set(value) & set("\0\r\n"):
            return False
        return bool(value.strip()) or (empty and not value)

    return Allowed("text" if empty else "text that is not empty", holds)


def expression(value: Any) -> bool:
    """Whether a value is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


def maybe(allowed: Allowed) -> Allowed:
    """The same, or None."""
    return Allowed(
        f"{allowed.wanted}, or None,",
        lambda value: value is None or allowed.holds(value),
        lambda text: None if text == "None" else allowed.read(text),
        allowed.choices,
    )


def pair(first: Allowed, second: Allowed) -> Allowed:
    """Two values, each of its kind."""

    def holds(values: Any) -> bool:
        two = isinstance(values, tuple | list) and len(values) == 2
        return two and first.holds(values[0]) and second.holds(values[1])

    return Allowed(f"a pair of {first.wanted} and {second.wanted}", holds)


def many(
    allowed: Allowed, least: int, most: int, *, different: bool = False, wanted: str = ""
) -> Allowed:
    """A list or tuple of `least` to `most` such values; `different`: none twice."""

    def holds(values: Any) -> bool:
        return (
            isinstance(values, tuple | list)
            and least <= len(values) <= most
            and all(map(allowed.holds, values))
            and not (different and len(set(values)) < len(values))
        )

    length = f"{least}" if least == most else f"{least} to {most}"
    kind, each = " different" * different, allowed.wanted.rstrip(",")
    words = f"a list of {length}{kind} values, each {each},"
    return Allowed(wanted or words, holds)


SHARE = number(0.0, 1.0)
YES = Allowed("True or False", lambda value: type(value) is bool)
SEED = whole(0, LARGEST_SEED)
PATTERN = Allowed("a regular expression", expression)
