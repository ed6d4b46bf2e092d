"""Which files of a directory hold a network's weights: whole or in shards, in which precision.

diffusers and transformers name a variant before the ending (`x.fp16.safetensors`) and, in shards,
`x.fp16-00001-of-00002.safetensors` under `x.safetensors.index.fp16.json`; older releases of
diffusers wrote `x-00001-of-00002.fp16.safetensors` under `x.safetensors.fp16.index.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from composer_jax.models.files import (
    PICKLES,
    is_index,
    member,
    open_tensors,
    read_json,
    refuse_pickle,
)

VARIANTS = ("", "fp32", "fp16", "bf16")  # preferred in this order, others after them by name
_NAME = r"{stem}(?:\.(?P<a>[\w-]+?))?{shard}(?:\.(?P<b>[\w-]+))?\.safetensors"
_INDEX = r"{stem}\.safetensors(?:\.(?P<a>[\w-]+))?\.index(?:\.(?P<b>[\w-]+))?\.json"
_SHARD = r"-\d{5}-of-\d{5}"


def choose_weights(names: Iterable[str], *stems: str) -> list[str]:
    """The files of one variant among the `names` of a folder; the one to open comes first.

    A stem is a name without its endings ("model"). [] where there are no weights.
    """
    names = sorted(names)
    for variant in sorted(set(_variants(names, stems)), key=_rank):
        for stem in stems:
            whole = f"{stem}.{variant}.safetensors".replace("..", ".")
            if whole in names:
                return [whole]
            for index in (("index", variant), (variant, "index")):
                name = ".".join(filter(None, (f"{stem}.safetensors", *index, "json")))
                if name in names:
                    pattern = re.compile(_NAME.format(stem=re.escape(stem), shard=_SHARD))
                    shards = [n for n in names if _variant(pattern.fullmatch(n)) == variant]
                    return [name, *shards]
    return []


def find_weights(root: Path, *stems: str) -> Path:
    """The safetensors file, or the index of several, that one of `stems` names under `root`.

    A stem may have a folder ("unet/model"). Raises ValueError where there is none; it tells how to
    convert a pickle that is there instead.
    """
    for stem in stems:
        folder = (root / stem).parent
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if chosen := choose_weights(names, Path(stem).name):
            return member(root, (Path(stem).parent / chosen[0]).as_posix())
    for stem in stems:
        for pickle in sorted((root / stem).parent.glob("*")):
            if pickle.suffix in PICKLES:
                refuse_pickle(pickle)
    raise ValueError(f"{root} lacks {' or '.join(f'{stem}.safetensors' for stem in stems)}")


def lacking_weights(root: Path, *stems: str) -> str:
    """What lacks of the weights that one of `stems` names under `root`, "" where all are there."""
    try:
        path = find_weights(root, *stems)
        if not is_index(path):
            return ""
        shards = set(map(str, read_json(path).get("weight_map", {}).values()))
    except ValueError:
        return " or ".join(f"{stem}.safetensors" for stem in stems)
    where = path.parent.relative_to(root)
    gone = [(where / n).as_posix() for n in sorted(shards) if not (path.parent / n).is_file()]
    return ", ".join(gone)


def is_cut(path: Path) -> bool:
    """Whether a safetensors or JSON file is not whole; others are taken as they are."""
    try:
        if path.suffix == ".safetensors":
            open_tensors(path)
        elif path.suffix == ".json":
            read_json(path)
    except ValueError:
        return True
    return False


def _variants(names: Iterable[str], stems: Iterable[str]) -> Iterable[str]:
    for stem in map(re.escape, stems):
        patterns = [re.compile(_NAME.format(stem=stem, shard="")),
                    re.compile(_INDEX.format(stem=stem))]  # fmt: skip
        for name in names:
            for pattern in patterns:
                if match := pattern.fullmatch(name):
                    yield _variant(match)


def _variant(match: re.Match | None) -> str | None:
    """The variant that a name says, "" for none; None where it is no such name."""
    if match is None:
        return None
    groups = match.groupdict()
    return groups["a"] or groups.get("b") or ""


def _rank(variant: str) -> tuple[int, str]:
    return (VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), variant)
