"""Batches from caches by tf.data, in an order that is a pure function of (seed, step).

Position p of a run is one slot of a fixed pattern, which says from which cache it is and how many
of that cache came before it; that number's epoch is a permutation of its own. So any step is as
cheap to start from as the first, and parts of a batch never overlap.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.data.cache import FORMAT, SPLIT, feature_specs, nested, other_maker, shard_path

ASKED = 256  # captions of an older cache that are tokenized again
PATTERN = 4096  # positions after which the proportions of a mix repeat, exactly


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
            texts, ids = self._captions(part.read(rows))
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
        """Examples of the first cache by index, a tree as `batches` gives it."""
        found = self._decode_all(self._parts[0].read(np.asarray(indices, np.int64)))
        return {"stored": {}} | nested({path: array.numpy() for path, array in found.items()})

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
        self, batch: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> Callable[[int], dict[str, Any]]:
        """`batch(step)`: the rows of one part of the global batch of that step, numpy arrays.

        It streams while steps follow each other, and starts anew at any other. `part`: (index, how
        many). Raises ValueError where `batch` cannot be split into so many, and, naming the shard,
        where one is damaged.
        """
        index, parts = part
        if batch % parts:
            raise ValueError(f"batch {batch} is not a multiple of {parts} parts")
        state: dict[str, Any] = {"next": None, "iterator": None}

        def at(step: int) -> dict[str, Any]:
            if step != state["next"]:
                data = self._dataset(step, batch, seed, index * batch // parts, batch // parts)
                state["iterator"] = data.as_numpy_iterator()
            try:
                flat = next(state["iterator"])
            except Exception as error:
                state["next"] = None
                damage = [str(part.damage) for part in self._parts if part.damage]
                raise ValueError(damage[0] if damage else f"{self.name}: {error}") from error
            state["next"] = step + 1
            return nested(flat)

        return at

    def _dataset(self, start: int, batch: int, seed: int, first: int, local: int):
        from composer_jax.data.tensorflow import tf

        lib = tf()
        source, rank, count = pattern(self.weights, seed)
        lengths = np.asarray([len(part) for part in self._parts], np.int64)

        def locate(step):
            """Which cache and which of its examples each row of a step is."""
            position = step * batch + first + lib.range(local, dtype=lib.int64)
            slot = position % len(source)
            which = lib.gather(source, slot)
            before = position // len(source) * lib.gather(count, which) + lib.gather(rank, slot)
            length = lib.gather(lengths, which)
            key = lib.stack([lib.fill([local], np.int64(seed)), which, before // length], axis=1)
            row = lib.raw_ops.RandomIndexShuffle(
                index=before % length,
                seed=lib.cast(key, lib.uint32),
                max_index=length - 1,
                rounds=4,
            )
            return which, row

        def read(which, row):
            records = np.empty(len(row), object)
            for number, part in enumerate(self._parts):
                mine = np.flatnonzero(which == number)
                if len(mine):
                    records[mine] = part.read(row[mine])
            return records

        def fetch(step):
            records = lib.numpy_function(read, locate(step), lib.string, stateful=False)
            return lib.data.Dataset.from_tensor_slices(lib.ensure_shape(records, [local]))

        data = lib.data.Dataset.range(start, np.iinfo(np.int64).max)
        data = data.flat_map(fetch).map(self._decode, lib.data.AUTOTUNE, deterministic=True)
        return data.batch(local, drop_remainder=True).prefetch(2)


class _Cache:
    """One folder of shards: what is known about it, and its records by index."""

    def __init__(self, folder: Path):
        self.folder, self.damage = folder, None
        if not (folder / "composer.json").is_file():
            raise ValueError(f"{folder} is no cache; make one with composer prepare")
        self.known = json.loads((folder / "composer.json").read_text())
        if self.known["format"] != FORMAT:
            raise ValueError(
                f"{folder}: format {self.known['format']}; this version reads {FORMAT}"
            )
        if not (folder / "dataset_info.json").is_file():
            raise ValueError(f"{folder} is not finished; run its composer prepare again")
        info = json.loads((folder / "dataset_info.json").read_text())
        split = next(s for s in info["splits"] if s["name"] == SPLIT)
        self._counts = [int(count) for count in split["shardLengths"]]
        shards = len(self._counts)
        self._paths = [shard_path(folder, shard, shards) for shard in range(shards)]
        self._ends = np.cumsum(self._counts)
        self._source = None
        for path in self._paths:
            if not path.is_file():
                raise ValueError(self._mend(path, "is missing"))
        if not len(self):
            raise ValueError(f"{folder} holds no example")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: np.ndarray) -> list[bytes]:
        """The serialised examples at those indices; raises ValueError, and notes it, for damage."""
        try:
            return self._records().__getitems__(rows.tolist())
        except Exception as error:
            bad = next((row for row in rows.tolist() if not self._whole(row)), int(rows[0]))
            path = self._paths[int(np.searchsorted(self._ends, bad, side="right"))]
            reason = str(error).strip().splitlines()[0][:150]
            self.damage = self._mend(path, f"is damaged ({reason})")
            raise ValueError(self.damage) from error

    def _records(self):
        if self._source is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            paths = [p for p, count in zip(self._paths, self._counts, strict=True) if count]
            self._source = ArrayRecordDataSource([str(path) for path in paths])
            if len(self._source) != len(self):
                raise ValueError(f"it holds {len(self._source)} records, {len(self)} are wanted")
        return self._source

    def _whole(self, row: int) -> bool:
        try:
            self._records().__getitems__([row])
        except Exception:
            return False
        return True

    def _mend(self, path: Path, what: str) -> str:
        notes = self.folder / "shards" / f"{self._paths.index(path):05d}.json"
        return f"{path} {what}; remove {notes} and run its composer prepare again"


def pattern(weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fixed shuffled pattern of positions: (source and rank of each slot, slots by source).

    The proportions are the weights, to within one slot of `PATTERN`.
    """
    length = PATTERN if len(weights) > 1 else 1
    ends = np.rint(np.cumsum(weights) * length).astype(np.int64)
    count = np.diff(ends, prepend=0)
    if (count < 1).any():
        raise ValueError(f"weights {list(weights)}: each must be at least 1 / {PATTERN} of all")
    source = np.repeat(np.arange(len(weights)), count)
    np.random.Generator(np.random.Philox(key=[seed, PATTERN])).shuffle(source)
    rank = np.zeros(length, np.int64)
    for number in range(len(weights)):
        rank[source == number] = np.arange(count[number])
    return source, rank, count


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


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def is_cache(text: str) -> bool:
    """Whether a config's source names caches, not something that is to be taken apart."""
    return re.match(r"(?:[\d.]+\*)?cache:", text) is not None
