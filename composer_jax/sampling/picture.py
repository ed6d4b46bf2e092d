"""An image of an edit, and the factors that it is taken apart into."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.conditions.base import listed
from composer_jax.conditions.decompose import decompose, known_alpha
from composer_jax.conditions.image import fit_map, load_rgba, on_white
from composer_jax.diffusion import use
from composer_jax.sampling.pipeline import OUTSIDE, Pipeline

log = logging.getLogger("composer_jax")

GROUND = 128  # grey level around what stands alone


class Picture:
    """The middle of an image at the model's size, and its factors, taken from that middle as
    training takes them, each when first asked for.

    `known`: condition -> value that is known of the image, in place of what would be taken from it.
    `tools`: as `decompose` takes them, beside those of the model. `asked`: the factors that were
    asked for; `taken`: those of them that were not known.
    """

    def __init__(
        self,
        pipe: Pipeline,
        image: Any,
        known: Mapping[str, Any] | None = None,
        tools: Mapping[str, Any] | None = None,
    ):
        self._pipe, self._tools = pipe, dict(tools or {})
        rgba = load_rgba(image)
        self._image = on_white(rgba)
        self._factors = {name: pipe.stored(name, value) for name, value in (known or {}).items()}
        self.asked: set[str] = set()
        self.taken: set[str] = set()
        self.pixels: np.ndarray = pipe.fit_image(self._image)  # uint8 [size, size, 3]
        size = self.pixels.shape[:2]
        self._given = {n: fit_map(a, size, "area") for n, a in known_alpha(rgba).items()}

    def factor(self, name: str) -> Any:
        """One condition, stored; raises ValueError where the model or the image has none."""
        if name not in self._pipe.names:
            self._pipe.uses({name: None})  # says so
        self.asked.add(name)
        if name not in self._factors:
            self.taken.add(name)
            tools = self._pipe.tools([name]) | self._tools
            stored = decompose(self.pixels, only=(name,), given=self._given, tools=tools)[name]
            self._factors[name] = self._pipe.stored(name, stored)
        return self._factors[name]

    def factors(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of some conditions that the model and the image have; the log says why others
        are missing."""
        found = {}
        for name in names:
            try:
                found[name] = self.factor(name)
            except ValueError as error:
                log.info("without %s: %s", name, error)
        return found

    def held(self, choice: Sequence[str], given, hold=None, vary=()) -> dict[str, Any]:
        """What a task takes from this picture: `hold`, or what there is of its own `choice`.

        Raises ValueError where `hold` names what is given, and where `vary` names what would not be
        held anyway.
        """
        vary, hold = listed(vary), hold if hold is None else listed(hold)
        for name in (*vary, *(hold or ())):
            conditions.get(name)
        if hold and vary:
            raise ValueError("hold and vary are both given; hold alone says all that is held")
        if both := [name for name in hold or () if name in given]:
            raise ValueError(f"{both[0]} is given, so the image's own cannot be held")
        if idle := [name for name in vary if name not in choice]:
            held = f"holds {', '.join(choice)}" if choice else "holds nothing by itself"
            raise ValueError(f"vary names {idle[0]}, which is not held: this task {held}")
        if hold is not None and not vary:
            return {name: self.factor(name) for name in hold}
        found = self.factors([n for n in choice if n not in vary and n not in given])
        if choice and not found and not given:
            raise ValueError(
                f"none of {', '.join(choice)} is left to hold; give one, or hold others"
            )
        return found

    def region(self, region: Any) -> np.ndarray:
        """A region float [H, W] of the image as float32 [size, size] in [0, 1]."""
        region = fit_map(self._region(region), self.pixels.shape[:2], "area")
        if not region.any():
            raise ValueError(f"the region {OUTSIDE}")
        return region

    def alone(self, region: Any) -> Picture:
        """What is in a region float [H, W] of the image, on a grey ground."""
        inside = fit_map(self._region(region), self._image.shape[:2], "nearest")[..., None]
        ground = np.uint8(GROUND)
        alone = Picture(self._pipe, np.where(inside > 0.5, self._image, ground), tools=self._tools)
        alone.asked, alone.taken = self.asked, self.taken
        return alone

    def _region(self, region: Any) -> np.ndarray:
        region = use(None, region=region).region  # checked
        (height, width), (rows, columns) = self._image.shape[:2], region.shape
        if abs(rows * width - columns * height) > max(height, width):
            raise ValueError(
                f"region has shape {list(region.shape)}, the image {[height, width]}; "
                "the same shape is wanted, at any size"
            )
        return region
