"""A source taken apart once: images, latents and every condition's stored value, kept on disk.

What trains directly from a small source keeps a pool of plain arrays; `composer prepare` writes a
cache (`data/cache.py`) of any size. Both take chunks apart here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.conditions import Feature
from composer_jax.data.shards import file_digest, reason_of
from composer_jax.data.sources import Source
from composer_jax.utils.atomic import WriteError, new_folder, write_text

log = logging.getLogger("composer_jax")
CHUNK = 64
Encoders = Mapping[str, Callable[[np.ndarray, dict], np.ndarray]]


def arrays_of(name: str, stored) -> Any:
    """What of a condition's stored value goes into a batch: everything but text."""
    feature = conditions.get(name).feature
    if isinstance(feature, Feature):
        return stored
    return {key: stored[key] for key, part in feature.items() if part.dtype != "str"}


def remembered(pools: Path | None, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, JSON's types: kept in `pools`, where these can be written, for the next
    start with the same `key`."""
    if pools is None:
        return make()
    path = pools / f"{_digest(key)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not there, or damaged
        kept = json.loads(path.read_text())
        if kept["digest"] == _digest(kept["made"]):
            return kept["made"]
    made = make()
    with contextlib.suppress(OSError):  # of others, whom all may read: then it is asked each time
        write_text(path, json.dumps({"made": made, "digest": _digest(made)}), sync=False)
    return made


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def available(
    source: Source, tools: Mapping[str, Any], names: Sequence[str]
) -> dict[str, str | None]:
    """For each of some conditions: None where this source and these tools give it, else why not,
    by its first examples that can be read."""
    starts = range(0, len(source), 2)
    examples = (source.batch(np.arange(start, min(start + 2, len(source)))) for start in starts)
    example = next((one for one in examples if len(one["image"])), None)
    if example is None:
        raise ValueError(f"{source.name}: no usable image; skipped {len(source)}")
    reasons = {}
    for name in names:
        condition = conditions.get(name)
        try:
            condition.extract(example["image"], example["given"], tools.get(condition.tool))
            reasons[name] = None
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def chunks(
    source: Source,
    indices: Sequence[int],
    names: Sequence[str],
    tools: Mapping[str, Any],
    encoders: Encoders,
    seconds: dict[str, float],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Takes examples apart, a chunk at a time: (images asked for, tree of what was found).

    The tree holds `image`, `stored` (a dict by condition, for the cached of `names`) and the result
    of each of `encoders`. The next chunk is read while conditions of this one are taken, each in a
    thread of its own. `seconds` gets the time of every stage.
    """

    def timed(stage: str, function: Callable, *args):
        start = time.perf_counter()
        result = function(*args)
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    def stages(example: dict) -> dict[str, Callable[[], Any]]:
        images, given = example["image"], example["given"]
        cached = [conditions.get(name) for name in names if conditions.get(name).cached]
        return {
            **{c.name: lambda c=c: c.extract(images, given, tools.get(c.tool)) for c in cached},
            **{key: lambda f=f: f(images, given) for key, f in encoders.items()},
        }

    parts = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor() as workers:
        coming = [reader.submit(timed, "read", source.batch, part) for part in parts[:2]]
        for number, part in enumerate(parts):
            example = coming.pop(0).result()
            if number + 2 < len(parts):
                coming.append(reader.submit(timed, "read", source.batch, parts[number + 2]))
            if len(example["image"]):
                made = {
                    stage: workers.submit(timed, stage, function)
                    for stage, function in stages(example).items()
                }
                found = {stage: future.result() for stage, future in made.items()}
                tree = {key: found.pop(key) for key in encoders}
                yield len(part), {"image": example["image"], "stored": found, **tree}
            else:
                yield len(part), {}


def prepare(
    source: Source,
    names: Sequence[str],
    tools: Mapping[str, Any],
    encoders: Encoders,
    pools: Path,
    made_by: Mapping[str, Any],
) -> dict[str, Any]:
    """Takes a whole source apart, or opens what an earlier call with the same `made_by` left.

    Returns a dict of arrays with a leading axis of examples, mapped from disk: `image` uint8
    [N, H, W, 3], `stored` (a dict by condition, for the cached of `names`) and, for each of
    `encoders` (name -> function of images and what the source knows), its result. Written in one
    move to a folder of its own in `pools`, which many runs may share. Raises ValueError where a
    condition cannot be had or no image is left.
    """
    key = json.dumps({"source": source.key, "count": len(source), "size": source.size,
                      "conditions": list(names), "encoders": sorted(encoders), **made_by},
                     sort_keys=True, default=str)  # fmt: skip
    folder = pools / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.is_dir():
        try:
            return _open(folder, key)
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s is damaged (%s) and is prepared anew", folder, reason_of(error))
            shutil.rmtree(folder)
    _write(source, names, tools, encoders, folder, key)
    return _open(folder, key)


def _write(source, names, tools, encoders, folder: Path, key: str) -> None:
    flat: list[dict] = []
    with tqdm(total=len(source), unit="image", desc="prepare") as bar:
        for asked, tree in chunks(source, range(len(source)), names, tools, encoders, {}):
            bar.update(asked)
            if tree:
                stored = {name: arrays_of(name, value) for name, value in tree["stored"].items()}
                flat.append(dict(_flatten({**tree, "stored": stored})))
    if not flat:
        raise ValueError(f"{source.name}: no usable image")
    try:
        with new_folder(folder) as new:
            for path in flat[0]:
                np.save(new / f"{path}.npy", np.concatenate([chunk[path] for chunk in flat]))
            digests = {path: file_digest(new / f"{path}.npy") for path in sorted(flat[0])}
            (new / "arrays.json").write_text(json.dumps(digests, indent=2))
            (new / "made_by.json").write_text(key)
    except WriteError:
        if not folder.is_dir():  # else another run has just written the same
            raise


def _flatten(tree: Mapping, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def _open(folder: Path, key: str) -> dict[str, Any]:
    tree: dict[str, Any] = {"stored": {}}
    names, listed = {path.stem for path in folder.glob("*.npy")}, folder / "arrays.json"
    if listed.is_file():  # not in pools of older versions
        wanted = json.loads(listed.read_text())
        if not isinstance(wanted, dict | list):
            raise ValueError("arrays.json is no list")
        if missing := sorted(set(wanted) - names):
            raise ValueError(f"{missing[0]}.npy is missing")
        if isinstance(wanted, dict):  # some older versions knew no digests
            for name in names:
                if wanted.get(name) != file_digest(folder / f"{name}.npy"):
                    raise ValueError(f"the content of {name}.npy has changed")
    if "image" not in names or (folder / "made_by.json").read_text() != key:
        raise ValueError("it is not whole")
    lengths = set()
    for name in sorted(names):
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.load(folder / f"{name}.npy", mmap_mode="r")
        lengths.add(len(node[leaf]))
    if len(lengths) > 1:
        raise ValueError("its arrays are not of one length")
    return tree


def fingerprint(tree) -> str:
    """A short hash of all arrays in a tree: which weights made something."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
