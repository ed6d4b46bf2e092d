"""Captions of built-in scenes: everything they say is true, what they leave out varies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {"torus": "tori"}


def caption(objects: Sequence[dict], floor: str, sky: str, rng: np.random.Generator) -> str:
    """One sentence about a scene's objects (dicts of `scenes.describe`), floor and sky.

    Mentions every object; sizes, materials, relations, floor and sky are drawn.
    """
    with_size, with_material = rng.random() < 0.7, rng.random() < 0.4

    def noun(thing: dict) -> str:
        words = [thing["size"]] * with_size + [thing["material"]] * with_material
        return " ".join([*words, thing["colour"], thing["shape"]])

    groups: dict[str, list[dict]] = {}
    for thing in objects:
        groups.setdefault(noun(thing), []).append(thing)
    things = list(groups.items())
    pairs = [(a, b) for a in range(len(things)) for b in range(len(things)) if a != b]
    rng.shuffle(pairs)
    order = list(range(len(things)))
    sentence = None
    for a, b in pairs:
        relations = _relations(things[a][1], things[b][1])
        if relations and rng.random() < 0.9:
            relation = str(rng.choice(relations))
            sentence = f"{_count(*things[a])} {relation} {_count(*things[b])}"
            order = [i for i in order if i not in (a, b)]
            break
    rest = [_count(*things[i]) for i in order]
    sentence = _join([*rest, sentence] if sentence else rest)
    if rng.random() < 0.5:
        sentence += f" on a {floor} floor"
    if rng.random() < 0.3:
        sentence += f" under a {sky} sky"
    return sentence


def altered(text: str, kinds: Sequence[Sequence[str]], rng: np.random.Generator) -> str:
    """The text with one word made another of its kind, or with two words of one kind exchanged:
    near to it, and false of its image. The second is no matter of words alone (arXiv 2210.01936).

    `kinds`: words that exclude each other. The text itself where it has none of them.
    """
    others = {word: [one for one in kind if one != word] for kind in kinds for word in kind}
    longest_first = sorted(map(re.escape, others), key=len, reverse=True)
    found = list(re.finditer(rf"\b(?:{'|'.join(longest_first)})\b", text))
    if not found:
        return text
    pairs = [(a, b) for a in found for b in found if a.start() < b.start() and b[0] in others[a[0]]]
    exchanged, said = [_replaced(text, {a: b[0], b: a[0]}) for a, b in pairs], _phrases(text)
    exchanged = [one for one in exchanged if _phrases(one) != said]
    if exchanged and rng.random() < 0.5:
        return exchanged[rng.integers(len(exchanged))]
    match = found[rng.integers(len(found))]
    return _replaced(text, {match: str(rng.choice(others[match[0]]))})


def _replaced(text: str, words: Mapping[re.Match, str]) -> str:
    """The text with words instead of matches, from left to right, and articles that fit."""
    parts, end = [], 0
    for match, word in words.items():
        article = "an " if word[0] in "aeiou" else "a "
        parts += [re.sub(r"\ban? $", article, text[end : match.start()]), word]
        end = match.end()
    return "".join([*parts, text[end:]])


def _phrases(text: str) -> list[str]:
    """What a caption says is there, in any order."""
    found = re.split(r", | and | left of | right of | in front of | behind | on | under ", text)
    return sorted(re.sub(r"^an? ", "", phrase) for phrase in found)


def _count(noun: str, things: Sequence[dict]) -> str:
    if len(things) == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    *words, shape = noun.split()
    return " ".join([NUMBERS[len(things)], *words, PLURALS.get(shape, shape + "s")])


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _relations(a: Sequence[dict], b: Sequence[dict]) -> list[str]:
    """What is true of every pair from the two groups, by screen x and by distance."""
    pairs = [(p, q) for p in a for q in b]
    found = []
    if all(p["x"] < q["x"] - 0.2 for p, q in pairs):
        found.append("left of")
    if all(p["x"] > q["x"] + 0.2 for p, q in pairs):
        found.append("right of")
    if all(p["distance"] < q["distance"] - 1.0 for p, q in pairs):
        found.append("in front of")
    if all(p["distance"] > q["distance"] + 1.0 for p, q in pairs):
        found.append("behind")
    return found
