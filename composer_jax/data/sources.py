"""The contract of a source of images, and how a source is named on the command line."""

from __future__ import annotations

import abc
from collections.abc import Sequence


class Source(abc.ABC):
    """Images of one size by index, with what is known about them."""

    name: str
    size: int

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def batch(self, indices: Sequence[int]) -> dict:
        """image uint8 [B, size, size, 3] and `given`, what the source knows (DESIGN 4)."""


def open_source(text: str, *, size: int, seed: int = 0, split: str = "train") -> Source:
    """Opens "scenes" or "scenes:COUNT"."""
    from composer_jax.data.scenes import Scenes

    return Scenes(int(text.partition(":")[2] or 20000), size=size, seed=seed, split=split)
