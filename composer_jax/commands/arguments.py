"""What the options of commands may be: how each is read from the command line, and checked.

Importing this imports nothing heavy, so that `cli` can refuse folders before a command is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer_jax.utils import values
from composer_jax.utils.atomic import check_writable

CONFIG = "--config."  # what overrides of a config begin with


def argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as argparse takes a type: what is wrong is said beside the option's name."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def value(allowed: values.Allowed) -> Callable[[str], Any]:
    """The type of an option that takes what is `allowed`."""
    return argument(lambda text: allowed.parse("the value", text))


def whole(least: int, most: int = values.MOST) -> Callable[[str], int]:
    """The type of an option that takes a whole number."""
    return value(values.whole(least, most))


def number(low: float, high: float, **ends: bool) -> Callable[[str], float]:
    """The type of an option that takes a finite number."""
    return value(values.number(low, high, **ends))


def listed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option that takes different words, separated by commas, each as `read`."""

    def several(text: str) -> tuple[Any, ...]:
        found = tuple(map(read, text.split(",")))
        for one in found:
            if found.count(one) > 1:
                raise ValueError(f"{text!r} names {one} twice")
        return found

    return argument(several)


def _span(text: str) -> tuple[float, float]:
    from composer_jax.diffusion.settings import SPAN

    start, colon, stop = text.partition(":")
    try:
        found = (float(start), float(stop)) if colon else text
    except ValueError:
        found = text
    SPAN.check("the value", found)
    return found


def _condition(text: str) -> str:
    from composer_jax import conditions

    return conditions.get(text).name


def _path(text: str) -> Path:
    return Path(values.text().parse("the value", text))


def _source(text: str) -> str:
    from composer_jax.data.sources import check_source

    check_source(text)
    return text


def _folder(text: str) -> Path:
    folder = _path(text)
    check_writable(folder)
    return folder


def _file(text: str) -> Path:
    path = _path(text)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is wanted")
    check_writable(path.parent)
    return path


count = whole(1, 1_000_000)
size = whole(1, 16_384)  # pixels
seed = value(values.SEED)
share = value(values.SHARE)
text = value(values.text())
span = argument(_span)
names = listed(_condition)
path = argument(_path)  # of what is read
source = argument(_source)
folder = argument(_folder)  # to write into
file = argument(_file)  # to write


def setting(name: str) -> Callable[[str], Any]:
    """The type of an option that is a setting of sampling."""
    from composer_jax.diffusion.settings import SETTINGS

    return span if name == "interval" else value(SETTINGS[name])


def take_rest(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """Takes config overrides, `--config.KEY=VALUE` or `--config.KEY VALUE`, out of what is left on
    the command line, into `args.overrides`."""
    args.overrides, left, words = [], [], iter(rest)
    for word in words:
        if not word.startswith(CONFIG):
            left.append(word)
            continue
        if "=" not in word and (following := next(words, None)) is not None:
            word += f"={following}"
        args.overrides.append(word.removeprefix(CONFIG))
    return left
