"""The sampler's programs, traced once and kept: what starts again does not trace our Python.

A program's file (`storage/programs.py`) is a function of weights by name and inputs:

    from jax import export
    call = export.deserialize(bytearray(Path("HASH.stablehlo").read_bytes())).call
    found = call(weights, inputs)              # found["images"] uint8 [B, H, W, 3]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from composer_jax.storage.programs import (
    kept_program,
    kept_programs,
    program_name,
    write_program,
)
from composer_jax.utils.precision import current_precision

ROOMS = (
    "conditions",
    "diffusion",
    "models",
    "sampling",
    "utils",
)  # whose code a program is made of


class Programs:
    """A function `run(kind, weights, inputs)`, compiled once for each kind and shapes of inputs.

    `about`: what else the trace depends on (configs), as JSON's types. `shipped`: a folder where
    programs may lie (`composer compile`). They are also looked for, and kept, beside what JAX's
    persistent compilation cache holds, where that is on. A kind that calls the host, and more than
    one device, are compiled without a file.
    """

    def __init__(self, run: Callable, about: Mapping[str, Any], shipped: Path):
        self._keep = kept_programs()
        self._about, self.shipped = about, shipped
        self._traced = jax.jit(run, static_argnums=0)
        self._opened: dict[tuple, Callable] = {}  # by kind and sizes of the inputs

    def __call__(self, kind: Any, weights: Mapping[str, jax.Array], inputs: Mapping[str, Any]):
        """Runs the program for these weights and inputs."""
        if kind.preview or jax.local_device_count() > 1:
            return self._traced(kind, weights, inputs)
        sizes = (
            kind,
            current_precision(),
            *((leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(inputs)),
        )
        if sizes not in self._opened:
            name = self.name(kind, weights, inputs)
            paths = [folder / name for folder in (self.shipped, self._keep) if folder]
            found = next((path for path in paths if path.is_file()), None)
            if not (found or self._keep):
                return self._traced(kind, weights, inputs)
            traced = jax.jit(functools.partial(self._traced, kind))
            path = found or self._keep / name
            self._opened[sizes] = jax.jit(kept_program(path, traced, weights, inputs))
        return self._opened[sizes](weights, inputs)

    def count(self) -> int:
        """How many programs were compiled or opened so far."""
        return self._traced._cache_size() + len(self._opened)

    def name(self, kind: Any, weights: Mapping[str, jax.Array], inputs: Mapping[str, Any]) -> str:
        """The file of a program: a digest of everything that its trace depends on."""
        return program_name(ROOMS, [self._about, repr(kind)], [weights, inputs])

    def export(self, folder: Path, kind: Any, weights, inputs) -> Path:
        """Traces a program and writes its file into `folder`, in one move; returns its path."""
        path = folder / self.name(kind, weights, inputs)
        write_program(path, jax.jit(functools.partial(self._traced, kind)), weights, inputs)
        return path
