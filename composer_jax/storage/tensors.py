"""Named tensors in one safetensors file, and modules filled from them, strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx


def module_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """All arrays of a module by dotted path, as numpy on the host."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str | None = None) -> None:
    """Writes a safetensors file; floating tensors as `dtype` where given."""
    from safetensors.numpy import save_file

    def cast(array):
        array = np.ascontiguousarray(array)
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(jnp.dtype(dtype)) if dtype and floating else array

    save_file({name: cast(array) for name, array in tensors.items()}, path)
    mask = os.umask(0)  # safetensors makes files that nobody else can read
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file; raises ValueError, one line, for a missing or broken one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def fill_module(module: nnx.Module, tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Puts tensors into a module by dotted path, as float32 where the module has float32.

    Strict: raises ValueError that names a missing, surplus or mis-shaped tensor; nothing is
    half-loaded. `where` names the file in the message.
    """
    state = nnx.state(module)
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    for name, variable in flat.items():
        if name not in tensors:
            raise ValueError(f"{where} lacks the tensor {name} {list(variable.shape)}")
        if tensors[name].shape != variable.shape:
            found, wanted = list(tensors[name].shape), list(variable.shape)
            raise ValueError(f"{where}: tensor {name} is {found}, the model wants {wanted}")
    for name in tensors:
        if name not in flat:
            raise ValueError(f"{where} has a tensor that the model lacks: {name}")
    for name, variable in flat.items():
        variable.set_value(jnp.asarray(tensors[name], variable.dtype))
    nnx.update(module, state)
