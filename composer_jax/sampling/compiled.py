"""Programs traced once and kept as StableHLO: what starts again does not trace our Python.

A program's file is `jax.export`'s serialisation of a function of plain dicts, weights by name and
inputs; no pickle. XLA's own work is kept beside it by JAX's persistent compilation cache.

    from jax import export
    call = export.deserialize(bytearray(Path("HASH.stablehlo").read_bytes())).call
    found = call(weights, inputs)              # found["images"] uint8 [B, H, W, 3]
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import export

import composer_jax

SUFFIX = ".stablehlo"
OURS = ("conditions", "diffusion", "models", "sampling")  # whose code a program is made of


class Programs:
    """A function `run(kind, weights, inputs)`, compiled once for each kind and shapes of inputs.

    `about`: what else the trace depends on (configs), as JSON's types. `shipped`: a folder where
    programs may lie (`composer compile`). They are also looked for, and kept, beside what JAX's
    persistent compilation cache holds, where that is on. A kind that calls the host, and more than
    one device, are compiled without a file.
    """

    def __init__(self, run: Callable, about: Mapping[str, Any], shipped: Path):
        cache = jax.config.jax_compilation_cache_dir
        self._keep = Path(cache) / "programs" if cache else None
        self._about, self.shipped = about, shipped
        self._traced = jax.jit(run, static_argnums=0)
        self._opened: dict[tuple, Callable] = {}  # by kind and sizes of the inputs

    def __call__(self, kind: Any, weights: Mapping[str, jax.Array], inputs: Mapping[str, Any]):
        """Runs the program for these weights and inputs."""
        if kind.preview or jax.local_device_count() > 1:
            return self._traced(kind, weights, inputs)
        sizes = kind, *((leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(inputs))
        if sizes not in self._opened:
            name = self.name(kind, weights, inputs)
            paths = [folder / name for folder in (self.shipped, self._keep) if folder]
            found = next((path for path in paths if path.is_file()), None)
            if not (found or self._keep):
                return self._traced(kind, weights, inputs)
            path = found or self.export(self._keep, kind, weights, inputs)
            self._opened[sizes] = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
        return self._opened[sizes](weights, inputs)

    def count(self) -> int:
        """How many programs were compiled or opened so far."""
        return self._traced._cache_size() + len(self._opened)

    def name(self, kind: Any, weights: Mapping[str, jax.Array], inputs: Mapping[str, Any]) -> str:
        """The file of a program: a digest of everything that its trace depends on."""
        shapes = jax.tree.map(lambda a: f"{a.dtype}{a.shape}", [weights, inputs])
        versions = [_fingerprint(), jax.__version__, jax.local_devices()[0].platform]
        about = [versions, self._about, repr(kind), shapes]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32] + SUFFIX

    def export(self, folder: Path, kind: Any, weights, inputs) -> Path:
        """Traces a program and writes its file into `folder`, in one move; returns its path."""
        traced = export.export(jax.jit(functools.partial(self._traced, kind)))(weights, inputs)
        path = folder / self.name(kind, weights, inputs)
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(traced.serialize())
        os.replace(new, path)
        return path


@functools.cache
def _fingerprint() -> str:
    """A digest of the code that programs are traced from."""
    digest, root = hashlib.sha256(), Path(composer_jax.__file__).parent
    for folder in OURS:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
