"""The contract of a condition and the registry that finds them all (DESIGN 4).

A file in this package (or in a folder appended to `composer_jax.conditions.__path__`) that ends in
`register(MyCondition())` is a condition of the whole system; nothing else has to be touched.
"""

from __future__ import annotations

import abc
import difflib
import hashlib
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.features import Feature, Part, Value, checked, unpacked
from composer_jax.conditions.image import fit_map

KINDS = ("spatial", "vector", "tokens")


class Condition(abc.ABC):
    """One factor of an image: how it is taken out, stored, given to the network and measured.

    `stored` has the structure of `feature`: one array, or a dict of arrays. `value` is a dict from
    part name to float32 array. `cached = False`: stored is not kept in the training cache and
    `draw` works from the image, and from what `draws_from`, another condition, has stored where the
    batch holds it. `tool`: which tool `extract` is handed, "clip", "depth",
    "segmenter" or None. `reads`: the keys of `given` that `extract` looks at, None for its own name
    alone. `judged_by`: which one `measure` prefers, where that is another.
    `switches`: names and help of the true-or-false keywords that `parse` takes; command lines have
    them as `--CONDITION.SWITCH`.
    """

    name: str
    doc: str
    keep_probability: float = 0.5
    parts: Mapping[str, Part]
    feature: Feature | Mapping[str, Feature]
    cached: bool = True
    draws_from: str | None = None
    tool: str | None = None
    reads: tuple[str, ...] | None = None
    judged_by: str | None = None
    switches: Mapping[str, str] = MappingProxyType({})

    @abc.abstractmethod
    def extract(self, images: np.ndarray, given: Mapping[str, Any] | None = None, tool=None):
        """Takes the condition out of images uint8 [B, H, W, 3]; returns stored, batched.

        `given` is what the source already knows (batched, under conventional names); it wins over
        `tool`. Raises ValueError where neither is enough.
        """

    def draw(self, key: jax.Array, stored, image: jax.Array) -> dict[str, jax.Array]:
        """Draws a training value of one example, in JAX; `image` is float32 [H, W, 3] in [0, 1].

        `stored` is None where the batch holds none. Without a random part: `value(stored)`.
        """
        del key, image
        return self.value(stored)

    @abc.abstractmethod
    def value(self, stored) -> dict[str, jax.Array]:
        """The deterministic twin of `draw`: the value of one example stored at the model's size."""

    @abc.abstractmethod
    def parse(self, text, tool=None):
        """Reads what a person hands in (text, a path or an array); returns stored of one example.

        Raises ValueError, one line naming what is wrong and what is allowed.
        """

    @abc.abstractmethod
    def render(self, stored) -> np.ndarray:
        """Draws stored of one example as a picture, uint8 [H, W, 3]."""

    def to_png(self, stored) -> np.ndarray:
        """Stored of one example as `composer decompose` writes it as PNG, for `parse` to read back:
        uint8 or uint16, [H, W], [H, W, 3] or, with alpha, [H, W, 4]. By default `render`'s picture.
        """
        return self.render(stored)

    def unpacked(self, source, tool=None) -> dict[str, Any] | None:
        """Stored of one example of a condition with several features, from a dict of them, from
        what `features.packed` gives, or from its .npy file; None where `source` is something else.

        Raises ValueError where a feature lacks or is not what it is to be.
        """
        fields = None if isinstance(self.feature, Feature) else unpacked(source)
        return None if fields is None else self.checked(fields, getattr(tool, "sizes", {}))

    def checked(self, stored, sizes: Mapping[str, int] = MappingProxyType({})) -> Any:
        """Stored of one example in the dtypes of `feature`; texts may lack.

        Raises ValueError, naming the feature, where one lacks, is unknown, or has another shape or
        numbers that its dtype does not hold. `sizes`: those that CLIP decides, where known.
        """
        return checked(self.name, self.feature, stored, sizes)

    @abc.abstractmethod
    def measure(self, wanted, image: np.ndarray, tool=None) -> float:
        """How well an image uint8 [H, W, 3] obeys `wanted` (stored, one example); 1 is perfect."""

    def judge(self, stored: Sequence[Any]) -> Callable[..., float]:
        """`measure` for examples of one data set, whose stored values these are.

        Another function where what all examples share must earn nothing.
        """
        del stored
        return self.measure

    @property
    def spatial(self) -> bool:
        """Whether a part of it is a map."""
        return any(part.kind == "spatial" for part in self.parts.values())

    def beside(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[..., float]]:
        """Further measures by name, of any range, printed beside `judge`'s: functions of a row,
        an image and the tool. `rows`: all that is stored of each example, by condition."""
        del rows
        return {}

    def absent(self, tool=None):
        """Stored of "nothing given", where absence has an encoding of its own (the empty caption).

        None, the default: an absent condition adds nothing and its tokens are masked out.
        """
        del tool
        return None

    def fit(self, stored, size: tuple[int, int]):
        """Crops and resizes stored of one example to `size` (h, w); what has no size stays."""

        def one(feature: Feature, array):
            if feature.shape[:2] != ("h", "w"):
                return array
            return fit_map(np.asarray(array), size, feature.resize)

        if isinstance(self.feature, Feature):
            return one(self.feature, stored)
        return {name: one(self.feature[name], array) for name, array in stored.items()}

    def blend(self, a: Mapping[str, Any], b: Mapping[str, Any], amount: float) -> Value:
        """Interpolates two values, from `a` (`amount` 0) to `b` (1); embeddings on the sphere."""
        mixed = Value()
        for name, part in self.parts.items():
            mix = slerp if part.shape == ("embed_width",) else _lerp
            mixed[name] = mix(jnp.asarray(a[name]), jnp.asarray(b[name]), amount)
        return mixed


def _lerp(a: jax.Array, b: jax.Array, amount: float) -> jax.Array:
    return (1.0 - amount) * a + amount * b


def slerp(a: jax.Array, b: jax.Array, amount: float) -> jax.Array:
    """Interpolates on the sphere over the last axis, lengths linearly (Shoemake 1985).

    `a`, `b`: float32 [..., D]; returns the same shape. Vectors that (nearly) point the same or the
    opposite way are interpolated linearly.
    """
    length_a = jnp.linalg.norm(a, axis=-1, keepdims=True)
    length_b = jnp.linalg.norm(b, axis=-1, keepdims=True)
    unit_a, unit_b = a / jnp.maximum(length_a, 1e-12), b / jnp.maximum(length_b, 1e-12)
    cosine = jnp.clip(jnp.sum(unit_a * unit_b, axis=-1, keepdims=True), -1.0, 1.0)
    angle = jnp.arccos(cosine)
    sine = jnp.sin(angle)
    steady = sine > 1e-4
    safe = jnp.where(steady, sine, 1.0)
    weight_a = jnp.where(steady, jnp.sin((1.0 - amount) * angle) / safe, 1.0 - amount)
    weight_b = jnp.where(steady, jnp.sin(amount * angle) / safe, amount)
    return (weight_a * unit_a + weight_b * unit_b) * _lerp(length_a, length_b, amount)


_REGISTERED: dict[str, Condition] = {}


def register(condition: Condition) -> Condition:
    """Makes a condition known under its name; returns it.

    Raises ValueError where the name is no lower-case identifier, another file already took it, or
    `parts` or `keep_probability` are not what the contract allows.
    """
    name = condition.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"condition name {name!r}: lower-case letters, digits and _ are allowed")
    if not 0.0 <= condition.keep_probability <= 1.0:
        raise ValueError(f"condition {name}: keep_probability must lie in [0, 1]")
    for part_name, part in condition.parts.items():
        if part.kind not in KINDS:
            raise ValueError(
                f"condition {name}: part {part_name!r} has kind {part.kind!r}; "
                f"allowed: {', '.join(KINDS)}{meant(part.kind, KINDS)}"
            )
    other = _REGISTERED.get(name)
    if other is not None and _visible(other, _modules()) and _module(other) != _module(condition):
        raise ValueError(f"condition {name} is already registered by {_module(other)}")
    _REGISTERED[name] = condition
    return condition


def get(name: str) -> Condition:
    """The condition of that name; raises ValueError, naming the likely one, where there is none."""
    known = names()
    if name not in known:
        raise ValueError(f"no condition {name!r}{meant(name, known)}; there are {', '.join(known)}")
    return _REGISTERED[name]


def names() -> tuple[str, ...]:
    """The names of all conditions, sorted; files that were added since the last call are found."""
    modules = _modules()
    for module, path in modules.items():
        _load(module, path)
    return tuple(sorted(n for n, c in _REGISTERED.items() if _visible(c, modules)))


def listed(which: str | Iterable[str]) -> tuple[str, ...]:
    """Names of conditions, as a list or as text with commas between them."""
    return tuple(which.split(",") if isinstance(which, str) else which)


def fingerprint(conditions: Sequence[str]) -> str:
    """A digest of the files of some conditions: which code made something."""
    digest = hashlib.sha256()
    for module in sorted({_module(get(name)) for name in conditions}):
        digest.update(Path(sys.modules[module].__file__).read_bytes())
    return digest.hexdigest()


def meant(word: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` where another known word is close to `word`, else nothing."""
    close = difflib.get_close_matches(str(word), known, n=1) if word not in known else ()
    return f" (did you mean {close[0]!r}?)" if close else ""


def _modules() -> dict[str, str]:
    """Module name -> the folder that holds it, for every file of the package's path right now."""
    folders = sys.modules[__package__].__path__
    return _listed(tuple((folder, _changed(folder)) for folder in folders))


def _changed(folder: str) -> int:
    """When files came to a folder, or went; 0 where there is none."""
    return os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0


@lru_cache(1)
def _listed(folders: tuple[tuple[str, int], ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules([folder for folder, _ in folders]):
        found.setdefault(f"{__package__}.{info.name}", os.path.realpath(info.module_finder.path))
    return found


def _load(module: str, path: str) -> None:
    loaded = sys.modules.get(module)
    if loaded is not None and _resolved(loaded.__file__).is_relative_to(path):
        return
    importlib.invalidate_caches()  # the file may be newer than the finder's last look
    sys.modules.pop(module, None)  # the same name from a folder that is no longer on the path
    for name in [n for n, c in _REGISTERED.items() if _module(c) == module]:
        del _REGISTERED[name]
    try:
        importlib.import_module(module)
    except Exception as error:  # a condition file is anybody's code
        raise ValueError(f"condition file {module} cannot be imported: {error}") from error


@cache
def _resolved(file: str) -> Path:
    return Path(file).resolve()


def _module(condition: Condition) -> str:
    return type(condition).__module__


def _visible(condition: Condition, modules: Mapping[str, str]) -> bool:
    """A condition of a file that left the path is gone; one registered from elsewhere stays."""
    module = _module(condition)
    return module in modules or not module.startswith(f"{__package__}.")
