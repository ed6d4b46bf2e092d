"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_OPERATION = re.compile(r"^\s*(?:ROOT\s+)?%?[\w.\-]+ = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_TRIPS = re.compile(r'known_trip_count":?\s*\{\s*"n":\s*"?(\d+)')
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step: how many run, and the bytes of their results.

    `unknown`: those in loops whose number of rounds the text does not say, counted once.
    """

    count: int = 0
    bytes: int = 0
    unknown: int = 0


def collectives(text: str) -> dict[str, Traffic]:
    """Traffic by kind, of a program's HLO text; an asynchronous one counts at its start.

    An all-reduce's and a permutation's bytes are its result's, a gather's the gathered, a
    reduce-scatter's the reduced before it is split: what passes through one device, about.
    """
    bodies, entry = _computations(text)
    found: dict[str, Traffic] = {}

    def walk(name: str, times: int, sure: bool) -> None:
        for shape, op, rest in bodies.get(name, ()):
            kind = op.removesuffix("-start")
            if kind in KINDS:
                if name.startswith("all-reduce-scatter"):  # how TPUs spell it: reduced, then split
                    kind = "reduce-scatter"
                old = found.get(kind, Traffic())
                found[kind] = Traffic(
                    old.count + times,
                    old.bytes + times * _moved(op, shape, rest),
                    old.unknown + (not sure),
                )
                continue
            trips = _TRIPS.search(rest) if op == "while" else None
            known = sure and (op != "while" or trips is not None)
            inner = times * (int(trips[1]) if trips else 1)
            called = _CALLED.findall(rest)
            for names in _BRANCHES.findall(rest):
                called += [word.strip().lstrip("%") for word in names.split(",")]
            for callee in called:
                walk(callee, inner, known)

    walk(entry, 1, True)
    return dict(sorted(found.items()))


def _computations(text: str) -> tuple[dict[str, list], str]:
    """Operations (shape, name, the rest of the line) by computation, and which one is the entry."""
    bodies: dict[str, list] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith(" "):
            current = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _OPERATION.match(line)):
            current.append(found.groups())
    return bodies, entry


def _moved(op: str, shape: str, rest: str) -> int:
    arrays = [_size(*array) for array in _ARRAY.findall(shape)]
    arrays = [size for size in arrays if size]
    if op in ("all-gather-start", "collective-permute-start"):
        # (operands, results, contexts): the results are the second half of what is not a counter
        data = [size for size in arrays if size > 8] or arrays
        return sum(data[len(data) // 2 :])
    if op.startswith("reduce-scatter"):
        operands = re.split(r"\), ", rest, maxsplit=1)[0]
        before = sum(_size(*array) for array in _ARRAY.findall(operands))
        groups = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
        split = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
        size = len(groups[1].split(",")) if groups else int(split[1]) if split else 1
        return before or sum(arrays) * size
    return sum(arrays)


def _size(kind: str, shape: str) -> int:
    digits = re.search(r"\d+", kind)
    if kind not in _BITS and not digits:
        return 0
    bits = _BITS[kind] if kind in _BITS else int(digits[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
