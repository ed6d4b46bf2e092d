"""Batches from caches by tf.data, in an order that is a pure function of (seed, step).

Any step is as cheap to start from as the first, and parts of a batch never overlap.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.data.cache import feature_specs, nested, other_maker, read_counts, read_made
from composer_jax.data.order import ORDER, Order
from composer_jax.data.shards import (
    Damaged,
    read_notes,
    reason_of,
    record_fault,
    shard_path,
    size_fault,
)

ASKED = 256  # captions of an older cache that are tokenized again
AGAIN = "run its composer prepare again"


class Caches:
    """Prepared caches: "cache:DIR", or several mixed by weight, "0.7*cache:A+0.3*cache:B".

    `name` is that text, `size` the images' side. Raises ValueError, one line, where a folder is no
    whole cache, or they differ in what is in them.
    """

    def __init__(self, text: str, *, size: int | None = None):
        self.name = text
        self._parts = [_Cache(Path(path)) for _, path in _parse(text)]
        self.weights = _normalised([weight for weight, _ in _parse(text)])
        first = self._parts[0]
        self.size, self.conditions = first.known["image_size"], tuple(first.known["conditions"])
        if size not in (None, self.size):
            raise ValueError(f"{text} holds images of {self.size} px, config.image_size is {size}")
        for other in self._parts[1:]:
            for key in ("image_size", "conditions", "sizes", "made_by"):
                values = first.known[key], other.known[key]
                if other_maker(*values) if key == "made_by" else values[0] != values[1]:
                    raise ValueError(
                        f"{first.folder} and {other.folder} cannot be mixed: {key} is "
                        f"{first.known[key]!r} and {other.known[key]!r}"
                    )
        specs = feature_specs(self.conditions, first.known["sizes"], self.size)
        self._specs = {path: spec for path, spec in specs.items() if spec.dtype != "str"}

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def check(self, names: Sequence[str], made_by: Mapping[str, Any]) -> None:
        """Raises ValueError where a condition is not in here, or other networks made it."""
        for name in names:
            if name not in self.conditions:
                raise ValueError(
                    f"{self.name} has no {name}; it has {', '.join(self.conditions)}; set "
                    "config.conditions, or prepare it anew"
                )
        for part in self._parts:
            known = part.known["made_by"]
            if key := other_maker(known, made_by):
                raise ValueError(
                    f"{self.name} was prepared with {key} {known.get(key)!r}, the config names "
                    f"{made_by[key]!r}; prepare it with this config"
                )

    def check_tokens(self, tokenize: Callable[[Sequence[str]], np.ndarray]) -> None:
        """Asks captions of caches that do not say which tokenizer made them; `tokenize`: texts to
        ids. Raises ValueError for one whose stored ids are others."""
        if "caption" not in self.conditions:
            return
        for part in self._parts:
            if "tokenizer" in part.known["made_by"]:
                continue
            rows = np.unique(np.linspace(0, len(part) - 1, min(len(part), ASKED)).astype(int))
            texts, ids = self._captions(self._read(part, rows))
            wrong = np.flatnonzero((tokenize(texts) != ids).any(axis=1))
            if wrong.size:
                raise ValueError(
                    f"{part.folder} was prepared by other rules of CLIP's tokenizer: of "
                    f"{len(texts)} captions that were looked at {wrong.size} have other tokens "
                    f"today, such as {texts[wrong[0]][:200]!r}; prepare it anew"
                )

    def _captions(self, records: Sequence[bytes]) -> tuple[list[str], np.ndarray]:
        from composer_jax.data.tensorflow import tf

        lib, texts, ids = tf(), [], []
        keys = ("stored/caption/text", "stored/caption/ids")
        features = {key: lib.io.FixedLenFeature((), lib.string) for key in keys}
        for record in records:
            found = lib.io.parse_single_example(record, features)
            texts.append(found[keys[0]].numpy().decode())
            ids.append(np.frombuffer(found[keys[1]].numpy(), np.int32))
        return texts, np.stack(ids)

    def examples(self, indices: Sequence[int]) -> dict[str, Any]:
        """Examples of the first cache by index, a tree as `batches` gives it.

        Raises ValueError for an index that it has not, and, naming the shard, for damage.
        """
        first, rows = self._parts[0], np.asarray(indices, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(first):
            raise ValueError(f"{first.folder} has examples 0 to {len(first) - 1}, not {indices}")
        try:
            found = self._decode_all(first.read(rows))
        except Exception as error:  # by array_record or TensorFlow
            raise self._failure(np.zeros_like(rows), rows, error) from error
        return {"stored": {}} | nested({path: array.numpy() for path, array in found.items()})

    def _read(self, part: _Cache, rows: np.ndarray) -> list[bytes]:
        try:
            return part.read(rows)
        except Exception as error:  # by array_record
            raise self._failure(np.full_like(rows, self._parts.index(part)), rows, error) from error

    def _failure(self, which: np.ndarray, rows: np.ndarray, error: Exception) -> ValueError:
        """Of examples that could not be read: names the shard that is to blame, if there is one."""
        for number, part in enumerate(self._parts):
            if culprit := part.culprit(rows[which == number], self._decode):
                return ValueError(culprit)
        return ValueError(f"{self.name} cannot be read ({reason_of(error)})")

    def _decode_all(self, records: Sequence[bytes]):
        from composer_jax.data.tensorflow import tf

        rows = [self._decode(record) for record in records]
        return {path: tf().stack([row[path] for row in rows]) for path in self._specs}

    def _decode(self, record):
        """One example's arrays by path, of its serialised tf.train.Example."""
        from composer_jax.data.tensorflow import tf

        lib = tf()
        features = {path: lib.io.FixedLenFeature((), lib.string) for path in self._specs}
        parsed, found = lib.io.parse_single_example(record, features), {}
        for path, spec in self._specs.items():
            if spec.codec == "png":
                channels = spec.shape[2] if len(spec.shape) == 3 else 1
                found[path] = lib.io.decode_png(parsed[path], channels, lib.as_dtype(spec.dtype))
            else:
                found[path] = lib.io.decode_raw(parsed[path], lib.as_dtype(spec.dtype))
            found[path] = lib.reshape(found[path], spec.shape)
        return found

    def batches(
        self, batch: int, seed: int, part: tuple[int, int] = (0, 1), order: int = ORDER
    ) -> Callable[[int], dict[str, Any]]:
        """`batch(step)`: the rows of one part of the global batch of that step, numpy arrays.

        It streams while steps follow each other, and starts anew at any other. `part`: (index, how
        many); `order`: the version of the order, see `data/order.py`. Raises ValueError where
        `batch` cannot be split into so many, and, naming the shard, where one is damaged.
        """
        index, parts = part
        if batch % parts:
            raise ValueError(f"batch {batch} is not a multiple of {parts} parts")
        local = batch // parts
        located = Order([len(one) for one in self._parts], self.weights, seed, order)
        state: dict[str, Any] = {}

        def locate(step: int) -> tuple[np.ndarray, np.ndarray]:
            return located(step * batch + index * local + np.arange(local))

        def at(step: int) -> dict[str, Any]:
            if step != state.get("next"):
                state["iterator"] = self._dataset(step, locate, local).as_numpy_iterator()
            try:
                flat = next(state["iterator"])
            except Exception as error:
                state.clear()
                raise self._failure(*locate(step), error) from error
            state["next"] = step + 1
            return nested(flat)

        # tf.data's threads run Python, which waits for them at its very end: it ends them before
        weakref.finalize(at, state.clear)
        return at

    def _dataset(self, start: int, locate: Callable, local: int):
        from composer_jax.data.tensorflow import tf

        lib = tf()

        def read(step):
            which, rows = locate(int(step))
            records = np.empty(local, object)
            for number, part in enumerate(self._parts):
                mine = np.flatnonzero(which == number)
                if len(mine):
                    records[mine] = part.read(rows[mine])
            return records

        def fetch(step):
            records = lib.numpy_function(read, [step], lib.string, stateful=False)
            return lib.data.Dataset.from_tensor_slices(lib.ensure_shape(records, [local]))

        data = lib.data.Dataset.range(start, np.iinfo(np.int64).max)
        data = data.flat_map(fetch).map(self._decode, lib.data.AUTOTUNE, deterministic=True)
        return data.batch(local, drop_remainder=True).prefetch(2)


class _Cache:
    """One folder of shards: what is known about it, and its records by index."""

    def __init__(self, folder: Path):
        self.folder, self._source = folder, None
        try:
            made = read_made(folder)
            if made is None:
                raise ValueError(f"{folder} is no cache; make one with composer prepare")
            self.known = made
            self._counts, total = read_counts(folder)
        except FileNotFoundError:
            raise ValueError(f"{folder} is not finished; {AGAIN}") from None
        except Damaged as error:
            raise ValueError(f"{error}; {AGAIN}") from None
        shards = len(self._counts)
        self._paths = [shard_path(folder, shard, shards) for shard in range(shards)]
        self._ends = np.cumsum(self._counts)
        if shards != self.known["shards"]:
            info = f"{folder / 'dataset_info.json'} tells of {shards} shards"
            raise ValueError(f"{info}, composer.json of {self.known['shards']}; {AGAIN}")
        if not len(self):
            raise ValueError(f"{folder} holds no example")
        self._check_sizes(total)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _check_sizes(self, total: int) -> None:
        """Raises ValueError naming a shard that is missing or has not the size that was noted."""
        sizes = [path.stat().st_size if path.is_file() else -1 for path in self._paths]
        if -1 not in sizes and sum(sizes) == total:
            return
        for shard, path in enumerate(self._paths):
            try:
                wanted = read_notes(self.folder, shard)["bytes"]
            except (FileNotFoundError, Damaged):
                wanted = sizes[shard]
            if fault := size_fault(path, wanted):
                raise ValueError(f"{fault}; {AGAIN}")
        raise ValueError(f"{self.folder / 'dataset_info.json'} does not fit the shards; {AGAIN}")

    def read(self, rows: np.ndarray) -> list[bytes]:
        """The serialised examples at those indices; raises what array_record raises."""
        if self._source is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            counted = zip(self._paths, self._counts, strict=True)
            paths = [f"{path}[0:{count}]" for path, count in counted if count]  # opened when read
            self._source = ArrayRecordDataSource(paths)
        return self._source.__getitems__(rows.tolist())

    def culprit(self, rows: np.ndarray, decode: Callable[[bytes], Any]) -> str | None:
        """Which shard is to blame where these rows cannot be read, and what to do."""
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard, row in sorted(set(zip(shards.tolist(), rows.tolist(), strict=True))):
            position = row - int(self._ends[shard]) + self._counts[shard]
            if fault := record_fault(self._paths[shard], position, decode):
                return f"{self._paths[shard]} is damaged ({fault}); {AGAIN} with --verify"
        return None


def _parse(text: str) -> list[tuple[float, str]]:
    """(weight, folder) pairs of "cache:DIR" or "0.7*cache:A+0.3*cache:B"."""
    found = []
    for term in re.split(r"\+(?=[\d.]*\*?cache:)", text):
        match = re.fullmatch(r"(?:([\d.]+)\*)?cache:(.+)", term.strip())
        try:
            weight = float(match[1] or 1.0)
        except (TypeError, ValueError):
            raise ValueError(
                f"source {text!r}: cache:DIR, or a mix like 0.7*cache:A+0.3*cache:B, is wanted"
            ) from None
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"source {text!r}: weight {weight:g} must be above 0")
        found.append((weight, match[2]))
    return found


def folders_of(text: str) -> list[Path]:
    """The folders that a source reads: of caches and of a folder, no others."""
    if is_cache(text):
        return [Path(path) for _, path in _parse(text)]
    kind, _, rest = text.partition(":")
    return [Path(rest)] if kind == "folder" else []


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def is_cache(text: str) -> bool:
    """Whether a config's source names caches, not something that is to be taken apart."""
    return re.match(r"(?:[\d.]+\*)?cache:", text) is not None
