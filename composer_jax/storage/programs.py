"""Programs kept as StableHLO, so that what starts again does not trace our Python.

A program's file is `jax.export`'s serialisation of a function of trees of plain containers and
arrays; no pickle. XLA's own work is kept beside it by JAX's persistent compilation cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

import composer_jax
from composer_jax.utils.atomic import WriteError, write_bytes
from composer_jax.utils.precision import current_precision

log = logging.getLogger("composer_jax")

SUFFIX = ".stablehlo"
TRACED = ("flax", "jax", "optax")  # packages whose code is traced, too


def kept_programs() -> Path | None:
    """The folder where programs are kept, beside JAX's persistent compilation cache; None where
    that is off."""
    cache = jax.config.jax_compilation_cache_dir
    return Path(cache) / "programs" if cache else None


def program_name(rooms: Sequence[str], about: Any, inputs: Any) -> str:
    """The file of a program: a digest of everything that its trace depends on.

    `rooms`: folders of this package whose code is traced; `about`: what else it depends on, as
    JSON's types; `inputs`: a tree of arrays, or shapes.
    """
    shapes = [f"{a.dtype}{a.shape}" for a in jax.tree.leaves(inputs)]
    versions = [fingerprint(tuple(rooms)), *map(version, TRACED), jax.local_devices()[0].platform]
    versions.append(current_precision())
    known = [versions, about, shapes, str(jax.tree.structure(inputs))]
    return (
        hashlib.sha256(json.dumps(known, sort_keys=True, default=repr).encode()).hexdigest()[:32]
        + SUFFIX
    )


def open_program(path: Path) -> Callable:
    """The function of a file, to be called under `jax.jit`; raises ValueError for a damaged one."""
    content = bytearray(path.read_bytes())
    try:
        return export.deserialize(content).call
    except Exception as error:  # struct's, of a file that is cut
        raise ValueError(f"program {path} is damaged") from error


def kept_program(path: Path, jitted: Callable, *inputs: Any) -> Callable:
    """The function of a file, which is traced and written where it is missing or damaged.

    One that cannot be written (a full disk) is said in the log, and runs all the same.
    """
    if path.is_file():
        try:
            return open_program(path)
        except (ValueError, OSError) as error:
            log.warning("%s; it is traced anew", error)
    traced = export.export(jitted)(*inputs)
    try:
        write_bytes(path, traced.serialize())
    except WriteError as error:
        log.warning("%s; it will be traced again at the next start", error)
    return traced.call


def write_program(path: Path, jitted: Callable, *inputs: Any) -> None:
    """Traces a jitted function and writes its file, in one move."""
    traced = export.export(jitted)(*inputs)
    write_bytes(path, traced.serialize())


@functools.cache
def fingerprint(rooms: tuple[str, ...]) -> str:
    """A digest of the code in some folders of this package."""
    digest, root = hashlib.sha256(), Path(composer_jax.__file__).parent
    for room in rooms:
        for path in sorted((root / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
