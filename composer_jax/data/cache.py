"""A source taken apart once, as ArrayRecord shards that TFDS opens, too (DESIGN 7).

    composer.json                            format, what made it, the conditions and their sizes
    composer-train.array_record-S-of-N       examples of a fixed range of the source, in its order
    shards/S.json                            of a shard: examples, bytes, hash, what was skipped
    dataset_info.json, features.json         TFDS's, when all shards are there; skipped.jsonl

An example holds `image`, `moments` and, under `stored`, each cached condition's features.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.conditions import Feature
from composer_jax.data.shards import (
    SPLIT,
    Damaged,
    notes_path,
    read_notes,
    shard_path,
    strange_files,
)
from composer_jax.utils.atomic import write_json, write_text
from composer_jax.utils.claims import differing, plain

FORMAT = 1
# what composer.json says, and of which type
MADE = {"format": int, "source": str, "count": int, "seed": int, "crop": str, "flip": bool}
MADE |= {"shard_size": int, "shards": int, "image_size": int, "conditions": list, "sizes": dict}
MADE |= {"made_by": dict}


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


def serialise(features, specs: Mapping[str, Feature], example: Mapping, row: int) -> bytes:
    """One row of a tree of arrays as a tf.train.Example; equal rows give equal bytes.

    `features`: as `tfds_features` gives them.
    """
    from composer_jax.data.tensorflow import tf

    flat = {}
    for path, spec in specs.items():
        node: Any = example
        for key in path.split("/"):
            node = node[key]
        flat[path] = encode(spec, node[row])
    # TFDS's bytes have the features of an example in an order that changes from run to run
    message = tf().train.Example.FromString(features.serialize_example(nested(flat)))
    return message.SerializeToString(deterministic=True)


def read_made(folder: Path) -> dict[str, Any] | None:
    """What composer.json says, None where it is not there; raises `Damaged` where it is, and
    ValueError for another format.
    """
    path = folder / "composer.json"
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        whole = all(type(made[key]) is kind for key, kind in MADE.items() if key != "format")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        made = {}
        whole = False
    if whole and made.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {made.get('format')}; this version reads {FORMAT}")
    if not whole:
        raise Damaged(f"{path} is damaged")
    return made


def read_counts(folder: Path) -> tuple[list[int], int]:
    """Examples of each shard, and bytes of all, as dataset_info.json says.

    Raises FileNotFoundError where there is none, `Damaged` where it is.
    """
    path = folder / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        split = next(split for split in info["splits"] if split["name"] == SPLIT)
        return [int(count) for count in split["shardLengths"]], int(split["numBytes"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, StopIteration, RecursionError):
        raise Damaged(f"{path} is damaged") from None


def claim(folder: Path, made: Mapping[str, Any]) -> tuple[str, bool]:
    """A hash of what makes this cache, for its shards' notes, and whether a damaged composer.json
    was written anew.

    Writes composer.json; one that is there must say the same, unless it is damaged and all shards
    are of this very call. Raises ValueError, one line, where the folder holds anything else.
    """
    path, made = folder / "composer.json", plain(made)
    call, others, damage, old = _call(made), strange_files(folder, 0), "", None
    try:
        old = read_made(folder)
    except ValueError as error:
        damage = str(error)
    may = lambda key: key == "made_by" and not other_maker(old[key], made[key])  # noqa: E731
    if old and not differing(old, made, may):
        return _call(old), False
    if not (others and _calls(folder) == {call}):
        if old:
            key = differing(old, made, may)
            raise ValueError(
                f"{folder} was made with {key} = {old.get(key)!r}, now it is {made.get(key)!r}; "
                "give another --out, or what it was made with"
            )
        if damage and others:
            raise ValueError(f"{damage}, and its shards may be of another call; give another --out")
        known = ("shards", "composer.json", ".composer.json.")  # also of one that has just begun
        there = folder.iterdir() if folder.is_dir() else ()
        if not damage and any(not one.name.startswith(known) for one in there):
            raise ValueError(f"{folder} exists and is no cache; give an empty or new folder")
    write_json(path, made)
    return call, bool(old or damage or others)


def _call(made: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def _calls(folder: Path) -> set[str | None]:
    """Of which calls the notes are that can be read; None stands for an older version's."""
    found = set()
    for path in folder.glob("shards/[0-9]*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.add(read_notes(folder, int(path.stem)).get("call"))
    return found


def finish(folder: Path, notes: Sequence[Mapping], specs: Mapping[str, Feature]) -> list[Path]:
    """Makes shards with these notes one dataset; returns the files that said something else."""
    with tempfile.TemporaryDirectory() as made:
        tfds_features(specs).save_config(made)
        features = (Path(made) / "features.json").read_text()
    split = {
        "name": SPLIT,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(sum(note["bytes"] for note in notes)),
        "shardLengths": [str(note["count"]) for note in notes],
    }
    info = {"name": "composer", "version": f"{FORMAT}.0.0", "fileFormat": "array_record"}
    info |= {"description": "Images taken apart by composer prepare.", "splits": [split]}
    texts = {
        "features.json": features,
        "skipped.jsonl": "".join(json.dumps(one) + "\n" for n in notes for one in n["skipped"]),
        "dataset_info.json": json.dumps(info, indent=2) + "\n",  # the last: then it is whole
    }
    wrong = []
    for name, text in texts.items():
        path = folder / name
        if not path.is_file():
            write_text(path, text)
        elif path.read_bytes() != text.encode():
            write_text(path, text)
            wrong.append(path)
    return wrong


def discard(folder: Path, shards: int) -> None:
    """Removes a cache that holds no example, and its folder where nothing else is in it."""
    for shard in range(shards):
        shard_path(folder, shard, shards).unlink(missing_ok=True)
        notes_path(folder, shard).unlink(missing_ok=True)
    for name in ("dataset_info.json", "features.json", "skipped.jsonl", "composer.json"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / "shards").rmdir()
        folder.rmdir()
