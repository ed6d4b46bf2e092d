"""What a condition stores and what the network takes of it; stored values as arrays and files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.conditions.image import load_array


@dataclass(frozen=True)
class Part:
    """One array that the network takes.

    `kind` and `shape`: "spatial" (C,), "vector" (D,) or "tokens" (L, D). A str in `shape` is a size
    that CLIP decides: "text_length", "text_width" or "embed_width". `norm`: the usual L2 norm of a
    vector, by which the network scales it to numbers of about 1; None where it has that size.
    """

    kind: str
    shape: tuple[int | str, ...]
    norm: float | None = None


@dataclass(frozen=True)
class Feature:
    """One array that is stored.

    `shape`: "h" and "w" are the image's height and width, other strings as in `Part`. `dtype`:
    numpy's name, or "str". `codec`: "png", "raw" or "text". `resize`: how `fit` changes an [h, w]
    feature's size, a way of `fit_map`: "photo", "nearest", "area" or "lines".
    """

    shape: tuple[int | str, ...]
    dtype: str
    codec: str
    resize: str = ""


class Value(dict):
    """A value that is ready for the network (of `Condition.value` or `blend`): part -> array.

    Taken wherever a stored value is, so that what was mixed need not be stored again.
    """


def packed(stored: Any) -> np.ndarray:
    """Stored of one example as one array without pickles: the features of a dict become the fields
    of a structured scalar. `unpacked` reads it back."""
    if not isinstance(stored, Mapping):
        return np.asarray(stored)
    fields = {key: np.asarray(value) for key, value in stored.items()}
    scalar = np.zeros((), [(key, a.dtype, a.shape) for key, a in fields.items()])
    for key, array in fields.items():
        scalar[key] = array
    return scalar


def unpacked(source: Any) -> Mapping[str, Any] | None:
    """The features of a dict, of what `packed` gives, or of its .npy file; None of anything else.

    Raises ValueError for several examples in one array, and for a file that cannot be read.
    """
    if isinstance(source, str | os.PathLike) and Path(source).suffix.lower() == ".npy":
        source = load_array(source)
    if isinstance(source, np.ndarray | np.void) and source.dtype.names:
        if source.shape:
            raise ValueError(f"{source.shape[0]} stored values in one array; one is wanted")
        return {name: source[name] for name in source.dtype.names}
    return source if isinstance(source, Mapping) else None


def checked(
    name: str, feature: Feature | Mapping[str, Feature], stored: Any, known: Mapping[str, int]
) -> Any:
    """Stored of one example of condition `name`, in the dtypes of `feature`; texts may lack.

    `known`: sizes that CLIP decides. Raises ValueError where a feature lacks or is not what it is
    to be.
    """
    sizes = dict(known)
    if isinstance(feature, Feature):
        return _checked(name, feature, stored, sizes)
    wanted = ", ".join(feature)
    if not isinstance(stored, Mapping):
        raise ValueError(f"{name} has {wanted}, not a {type(stored).__name__}")
    for key in stored:
        if key not in feature:
            raise ValueError(f"{name} has no {key!r}; it has {wanted}")
    for key, one in feature.items():
        if key not in stored and one.dtype != "str":
            raise ValueError(f"{name} lacks {key!r}; it has {wanted}")
    return {
        key: _checked(f"{name}'s {key}", one, stored[key], sizes)
        for key, one in feature.items()
        if key in stored
    }


def _checked(what: str, feature: Feature, value: Any, sizes: dict[str, int]) -> Any:
    """One feature. `sizes` are those that are known; it gets the others."""
    if feature.dtype == "str":
        return str(value)
    array = np.asarray(value)
    fits = array.ndim == len(feature.shape) and all(
        sizes.setdefault(side, n) == n if isinstance(side, str) else side == n
        for side, n in zip(feature.shape, array.shape, strict=True)
    )
    if not fits or not array.size:
        shape = ", ".join(str(sizes.get(side, side)) for side in feature.shape)
        raise ValueError(f"{what} has shape {list(array.shape)}; [{shape}] is wanted")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"{what} holds {array.dtype} that are no finite numbers")
    dtype = np.dtype(feature.dtype)
    if dtype.kind in "iu" and not np.can_cast(array.dtype, dtype):
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if array.min() < low or array.max() > high or np.any(array % 1 != 0):
            raise ValueError(f"{what} is to hold whole numbers from {low} to {high}")
    return array.astype(dtype)
