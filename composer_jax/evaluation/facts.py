"""What a caption of the built-in world states, and how much of it is true of an image."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.optimize import linear_sum_assignment

from composer_jax.conditions.caption import FACTS
from composer_jax.data.captions import NUMBERS, PLURALS
from composer_jax.data.scenes import COLOURS, MATERIALS, SHAPES, SIZES
from composer_jax.models.objects import ObjectDetector, Thing

RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
    "in front of": lambda a, b: a.distance < b.distance,
    "behind": lambda a, b: a.distance > b.distance,
}
REMEMBERED = 4096  # images whose objects a reader keeps
_SINGULAR = {PLURALS.get(shape, shape + "s"): shape for shape in SHAPES[1:]}
_COUNTS = {"a": 1, "an": 1, **{word: i for i, word in enumerate(NUMBERS) if i}}


def _any(words) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_GROUP = re.compile(
    rf"\b(?P<count>{_any(_COUNTS)}) (?:(?P<size>{_any(SIZES)}) )?(?:(?:{_any(MATERIALS)}) )?"
    rf"(?:(?P<colour>{_any(COLOURS)}) )?(?P<shape>{_any([*SHAPES[1:], *_SINGULAR])})\b"
)
_RELATION = re.compile(rf" (?:is |are )?(?:to the )?(?P<name>{_any(RELATIONS)}) ")


@dataclass(frozen=True)
class Stated:
    """What a caption states: groups of `count` alike objects, and (group, relation, group)s."""

    groups: list[dict]
    relations: list[tuple[int, str, int]] = field(default_factory=list)


def stated(text: str) -> Stated:
    """Reads a caption of `data.captions`, or one that a person wrote in its words.

    A group is a dict of count, shape, and colour and size, None where they are left open. Without
    any group nothing is stated.
    """
    found = list(_GROUP.finditer(text.lower()))
    groups = []
    for match in found:
        shape = match["shape"]
        group = {key: match[key] for key in ("colour", "size")}
        group |= {"shape": _SINGULAR.get(shape, shape), "count": _COUNTS[match["count"]]}
        groups.append(group)
    between = [
        _RELATION.fullmatch(text.lower()[a.end() : b.start()]) for a, b in itertools.pairwise(found)
    ]
    relations = [(i, match["name"], i + 1) for i, match in enumerate(between) if match]
    return Stated(groups, relations)


def check(said: Stated, things: Sequence[Thing]) -> Counter:
    """How many facts are stated and how many found: a Counter of (fact, "stated" or "found").

    Stated objects are matched one to one with what was seen, so that most facts hold. `count` is
    one fact, the number of all objects; a relation holds where it does of every pair.
    """
    wanted = [(i, group) for i, group in enumerate(said.groups) for _ in range(group["count"])]
    agree = np.zeros((len(wanted), len(things)))
    for row, (_, group) in zip(agree, wanted, strict=True):
        row[:] = [sum(group[key] == getattr(t, key) for key in FACTS[:3]) for t in things]
    pairs = dict(zip(*linear_sum_assignment(agree, maximize=True), strict=True))
    matched = [things[pairs[k]] if k in pairs else None for k in range(len(wanted))]
    tally: Counter = Counter()
    for (_, group), thing in zip(wanted, matched, strict=True):
        for key in FACTS[:3]:
            if group[key] is not None:
                tally[key, "stated"] += 1
                tally[key, "found"] += thing is not None and group[key] == getattr(thing, key)
    if wanted:
        tally["count", "stated"] = 1
        tally["count", "found"] = int(len(things) == len(wanted))
    for a, relation, b in said.relations:
        ends = [[matched[k] for k, (i, _) in enumerate(wanted) if i == end] for end in (a, b)]
        holds = all(p and q and RELATIONS[relation](p, q) for p in ends[0] for q in ends[1])
        tally["relation", "stated"] += 1
        tally["relation", "found"] += holds
    return tally


class FactReader:
    """A detector that tells how much of a caption is true; the tool that judges captions.

    It looks at an image once, however many captions and kinds of facts are asked about.
    """

    def __init__(self, detector: ObjectDetector):
        self._look = detector.look()

        @lru_cache(REMEMBERED)
        def things(pixels: bytes, shape: tuple[int, ...]) -> list[Thing]:
            return self._look(np.frombuffer(pixels, np.uint8).reshape(1, *shape))[0][1]

        self._things = things

    def agreement(self, text: str, image: np.ndarray, facts: Sequence[str] = FACTS) -> float:
        """The share of stated `facts` found in an image uint8 [H, W, 3]; nan where none is."""
        image = np.asarray(image)
        tally = check(stated(text), self._things(image.tobytes(), image.shape))
        found, total = (sum(tally[fact, what] for fact in facts) for what in ("found", "stated"))
        return found / total if total else float("nan")

    def certainty(self, images: np.ndarray) -> float:
        """How sure the detector is of shapes in images uint8 [B, H, W, 3]: the mean over objects of
        the likeliest shape's probability; nan without objects."""
        sure = [thing.certainty for _, things in self._look(images) for thing in things]
        return float(np.mean(sure)) if sure else float("nan")
