"""One image taken apart into its conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from composer_jax.conditions.base import get, listed, meant, names

OBJECTS = "objects"  # what scenes know besides, for the training of detectors


def decompose(
    image: np.ndarray,
    *,
    only: str | Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    tools: Mapping[str, Any] | None = None,
    skipped: Callable[[str, str], None] = lambda name, reason: None,
) -> dict[str, Any]:
    """Condition -> stored value of one image uint8 [H, W, 3].

    `only`: which conditions (a list, or "sketch,palette"), all by default. `given`: what is known
    about the image, without a batch axis (caption, depth, instances, alpha, ...). `tools`: by name
    (clip, depth, segmenter). A condition that needs a tool that is not there raises ValueError
    where `only` asks for it; else it is left out and `skipped(name, reason)` is called. Raises
    ValueError for a key that no condition reads, too.
    """
    known = [get(name) for name in names()]
    reads = {key for one in known for key in ((one.name,) if one.reads is None else one.reads)}
    _check_keys("given", given, reads | {OBJECTS})
    _check_keys("tools", tools, {one.tool for one in known})
    batched = {
        key: [value] if isinstance(value, str) else np.asarray(value)[None]
        for key, value in (given or {}).items()
    }
    found = {}
    for name in names() if only is None else listed(only):
        condition = get(name)
        try:
            stored = condition.extract(image[None], batched, (tools or {}).get(condition.tool))
        except ValueError as error:
            if only is not None:
                raise
            skipped(name, str(error))
            continue
        found[name] = jax.tree.map(lambda a: a[0], stored, is_leaf=lambda a: isinstance(a, list))
    return found


def _check_keys(what: str, values: Mapping[str, Any] | None, known: set[str | None]) -> None:
    words = sorted(filter(None, known))
    for key in values or ():
        if key not in known:
            raise ValueError(
                f"{what} has {key!r}{meant(key, words)}, which no condition reads; it takes "
                f"{', '.join(words)}"
            )


def known_alpha(image: np.ndarray) -> dict[str, np.ndarray]:
    """The transparency of an image uint8 [H, W, 3 or 4], as `given` has it: {"alpha": [H, W]}."""
    return {"alpha": image[..., 3]} if image.shape[2] == 4 else {}
