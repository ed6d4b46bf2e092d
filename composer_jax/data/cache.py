"""A source taken apart once, as ArrayRecord shards that TFDS opens, too (DESIGN 7).

    composer.json                            format, what made it, the conditions and their sizes
    composer-train.array_record-S-of-N       examples of a fixed range of the source, in its order
    shards/S.json                            how many, what was skipped, how long each stage took
    dataset_info.json, features.json         TFDS's, when all shards are there; skipped.jsonl

An example holds `image`, `moments` and, under `stored`, each cached condition's features.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.conditions import Feature

FORMAT = 1
SPLIT = "train"


def feature_specs(names: Sequence[str], sizes: Mapping[str, int], size: int) -> dict[str, Feature]:
    """Every array of an example by its path ("stored/depth"), with the sizes as numbers.

    `sizes`: what CLIP decides, and the codec's `factor` and `latent_channels`.
    """
    known, side = {**sizes, "h": size, "w": size}, size // sizes["factor"]
    found = {
        "image": Feature((size, size, 3), "uint8", "png"),
        "moments": Feature((side, side, 2 * sizes["latent_channels"]), "float16", "raw"),
    }

    def add(path: str, feature: Feature) -> None:
        shape = tuple(known[side] if isinstance(side, str) else side for side in feature.shape)
        found[path] = Feature(shape, feature.dtype, feature.codec)

    for name in names:
        condition = conditions.get(name)
        if condition.cached and isinstance(condition.feature, Feature):
            add(f"stored/{name}", condition.feature)
        elif condition.cached:
            for part, feature in condition.feature.items():
                add(f"stored/{name}/{part}", feature)
    return found


def other_maker(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first key in which two `made_by` differ; older caches lack "tokenizer", which is then
    asked of their captions (`Caches.check_tokens`)."""
    old, new = json.loads(json.dumps([dict(old), dict(new)]))
    late = {"tokenizer"} if not ("tokenizer" in old and "tokenizer" in new) else set()
    return next((key for key in new if key not in late and old.get(key) != new[key]), None)


def nested(flat: Mapping[str, Any]) -> dict:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def tfds_features(specs: Mapping[str, Feature]):
    """The same as `tfds.features`."""
    from composer_jax.data.tensorflow import tfds

    features = tfds().features

    def one(spec: Feature):
        if spec.codec == "text":
            return features.Text()
        if spec.codec == "png":
            shape = spec.shape if len(spec.shape) == 3 else (*spec.shape, 1)
            return features.Image(
                shape=shape, dtype=np.dtype(spec.dtype), encoding_format="png", use_colormap=False
            )
        return features.Tensor(shape=spec.shape, dtype=np.dtype(spec.dtype), encoding="bytes")

    return features.FeaturesDict(nested({path: one(spec) for path, spec in specs.items()}))


def encode(spec: Feature, array) -> Any:
    """One array of an example as TFDS's features take it; PNGs are encoded here."""
    if spec.codec == "text":
        return str(array)
    array = np.asarray(array, spec.dtype)
    if array.shape != spec.shape:
        raise ValueError(f"shape {array.shape}; {spec.shape} is wanted")
    if spec.codec != "png":
        return array
    import cv2

    if array.ndim == 3 and array.shape[2] == 3:
        array = array[..., ::-1]
    return io.BytesIO(cv2.imencode(".png", array)[1].tobytes())


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    """The file of one shard."""
    return folder / f"composer-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def notes_path(folder: Path, shard: int) -> Path:
    """What is known about one shard; it is there when the shard is whole."""
    return folder / "shards" / f"{shard:05d}.json"


def write_shard(
    folder: Path, shard: int, shards: int, examples: Sequence[bytes], notes: Mapping
) -> None:
    """Writes a shard, then its notes, each in one move."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = shard_path(folder, shard, shards)
    new = folder / "shards" / f"{path.name}.{os.getpid()}.new"
    new.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(new), "group_size:1")
    for example in examples:
        writer.write(example)
    writer.close()
    bytes_ = new.stat().st_size
    new.replace(path)
    write_whole(notes_path(folder, shard), {"count": len(examples), "bytes": bytes_, **notes})


def write_whole(path: Path, values: Mapping) -> None:
    """Writes JSON in one move."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(values, indent=2) + "\n")
    new.replace(path)


def finish(folder: Path, shards: int, specs: Mapping[str, Feature]) -> list[dict] | None:
    """Makes the shards one dataset when all are there; returns their notes, else None."""
    paths = [notes_path(folder, shard) for shard in range(shards)]
    if not all(path.is_file() for path in paths):
        return None
    notes = [json.loads(path.read_text()) for path in paths]
    made = folder / f"shards/features.{os.getpid()}"
    made.mkdir(exist_ok=True)
    tfds_features(specs).save_config(str(made))
    (made / "features.json").replace(folder / "features.json")
    made.rmdir()
    for left in folder.glob("shards/*.new"):  # by processes that were killed
        left.unlink(missing_ok=True)
    lines = [json.dumps(one) + "\n" for note in notes for one in note["skipped"]]
    (folder / "skipped.jsonl").write_text("".join(lines))
    split = {
        "name": SPLIT,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(sum(note["bytes"] for note in notes)),
        "shardLengths": [str(note["count"]) for note in notes],
    }
    info = {"name": "composer", "version": f"{FORMAT}.0.0", "fileFormat": "array_record"}
    info["description"] = "Images taken apart by composer prepare."
    write_whole(folder / "dataset_info.json", {**info, "splits": [split]})
    return notes
