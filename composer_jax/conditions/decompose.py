"""One image taken apart into its conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from composer_jax.conditions.base import get, listed, names


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
    where `only` asks for it; else it is left out and `skipped(name, reason)` is called.
    """
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


def known_alpha(image: np.ndarray) -> dict[str, np.ndarray]:
    """The transparency of an image uint8 [H, W, 3 or 4], as `given` has it: {"alpha": [H, W]}."""
    return {"alpha": image[..., 3]} if image.shape[2] == 4 else {}
