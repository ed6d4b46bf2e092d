"""A source taken apart once: images, latents and every condition's stored value, kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.conditions import Feature
from composer_jax.data.sources import Source

CHUNK = 64


def arrays_of(name: str, stored) -> Any:
    """What of a condition's stored value goes into a batch: everything but text."""
    feature = conditions.get(name).feature
    if isinstance(feature, Feature):
        return stored
    return {key: stored[key] for key, part in feature.items() if part.dtype != "str"}


def available(source: Source, tools: Mapping[str, Any]) -> dict[str, str | None]:
    """For every known condition: None where this source and these tools give it, else why not."""
    example = source.batch(np.arange(min(2, len(source))))
    reasons = {}
    for name in conditions.names():
        condition = conditions.get(name)
        try:
            condition.extract(example["image"], example["given"], tools.get(condition.tool))
            reasons[name] = None
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def prepare(
    source: Source,
    names: Sequence[str],
    tools: Mapping[str, Any],
    encoders: Mapping[str, Callable[[np.ndarray, dict], np.ndarray]],
    folder: Path,
    made_by: Mapping[str, Any],
) -> dict[str, Any]:
    """Takes a whole source apart, or opens what an earlier call with the same `made_by` left.

    Returns a dict of arrays with a leading axis of examples, mapped from disk: `image` uint8
    [N, H, W, 3], `stored` (a dict by condition, for the cached of `names`) and, for each of
    `encoders` (name -> function of images and what the source knows), its result. Written to
    `folder` in one move. Raises ValueError where a condition cannot be had or no image is left.
    """
    key = json.dumps({"source": source.name, "count": len(source), "size": source.size,
                      "conditions": list(names), "encoders": sorted(encoders), **made_by},
                     sort_keys=True, default=str)  # fmt: skip
    key_file = folder / "made_by.json"
    if not (key_file.is_file() and key_file.read_text() == key):
        _write(source, names, tools, encoders, folder, key)
    return _open(folder)


def _write(source, names, tools, encoders, folder: Path, key: str) -> None:
    chunks: list[dict] = []
    with tqdm(total=len(source), unit="image", desc="prepare") as bar:
        for start in range(0, len(source), CHUNK):
            indices = np.arange(start, min(start + CHUNK, len(source)))
            example = source.batch(indices)
            bar.update(len(indices))
            if len(example["image"]) == 0:
                continue
            stored = {}
            for name in names:
                condition = conditions.get(name)
                if condition.cached:
                    tool = tools.get(condition.tool)
                    value = condition.extract(example["image"], example["given"], tool)
                    stored[name] = arrays_of(name, value)
            made = {k: encode(example["image"], example["given"]) for k, encode in encoders.items()}
            chunks.append({"image": example["image"], "stored": stored, **made})
    if not chunks:
        raise ValueError(f"{source.name}: no usable image")
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    flat = [dict(_flatten(chunk)) for chunk in chunks]
    for path in flat[0]:
        np.save(new / f"{path}.npy", np.concatenate([chunk[path] for chunk in flat]))
    (new / "made_by.json").write_text(key)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _flatten(tree: Mapping, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def _open(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {"stored": {}}
    for path in sorted(folder.glob("*.npy")):
        *parents, leaf = path.name.removesuffix(".npy").split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.load(path, mmap_mode="r")
    return tree


def fingerprint(tree) -> str:
    """A short hash of all arrays in a tree: which weights made something."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
