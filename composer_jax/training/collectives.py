"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_OPERATION = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_TRIPS = re.compile(r'known_trip_count":?\s*\{\s*"n":\s*"?(\d+)')
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_WORK = ("fusion", "convolution", "dot", "custom-call", "while", "conditional", "call")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step: how many run, and the bytes of their results.

    `hidden`: bytes of those that are under way while something is computed. `unknown`: how many are
    in loops whose number of rounds the text does not say, counted once.
    """

    count: int = 0
    bytes: int = 0
    hidden: int = 0
    unknown: int = 0


def collectives(text: str) -> dict[str, Traffic]:
    """Traffic by kind, of a program's HLO text; an asynchronous one counts at its start.

    An all-reduce's and a permutation's bytes are its result's, a gather's the gathered, a
    reduce-scatter's the reduced before it is split: what passes through one device, about. XLA for
    TPUs writes a collective that goes on within fusions into each of them: it counts once.
    """
    bodies, entry = _computations(text)
    found: dict[str, Traffic] = {}
    fused: set[tuple[str, str]] = set()

    def walk(name: str, times: int, sure: bool, hidden: bool) -> None:
        operations = bodies.get(name, [])
        for index, (own, shape, op, rest) in enumerate(operations):
            beside = hidden or _overlaps(operations, index, own, op)
            kind = op.removesuffix("-start")
            if kind in KINDS:
                if name.startswith("all-reduce-scatter"):  # how TPUs spell it: reduced, then split
                    kind = "reduce-scatter"
                if "async_collective_fusion_config" in rest and (channel := _CHANNEL.search(rest)):
                    if (kind, channel[1]) in fused:
                        continue
                    fused.add((kind, channel[1]))
                    beside = True
                old, size = found.get(kind, Traffic()), times * _moved(op, shape, rest)
                found[kind] = Traffic(
                    old.count + times,
                    old.bytes + size,
                    old.hidden + beside * size,
                    old.unknown + (not sure),
                )
                continue
            rounds = _rounds(bodies, name, rest) if op == "while" else 1
            known, inner = sure and rounds is not None, times * (rounds or 1)
            called = _CALLED.findall(rest)
            for names in _LISTED.findall(rest):
                called += [word.strip().lstrip("%") for word in names.split(",")]
            for callee in called:
                walk(callee, inner, known, beside)

    walk(entry, 1, True, False)
    return dict(sorted(found.items()))


def _rounds(bodies: dict[str, list], name: str, rest: str) -> int | None:
    """How often a loop in computation `name` goes round: as told, or counted, or None.

    Counted are loops while i < n whose start, step and n are constants: XLA's own, which send one
    part while they compute with another, and of which it does not tell.
    """
    told, loop = _TRIPS.search(rest), _LOOP.search(rest)
    if told or not loop:
        return int(told[1]) if told else None
    outer, condition, body = (
        {own: (op, more) for own, _, op, more in bodies.get(where, ())}
        for where in (name, *loop.groups())
    )
    tests = [more for op, more in condition.values() if op == "compare" and "direction=LT" in more]
    test = tests[0] if len(tests) == 1 else ""
    index = re.search(r"index=(\d+)", condition.get(_operand(test, 0), ("", ""))[1])
    if not index:
        return None

    def counter(inside: dict, own: str) -> str:  # in a tuple
        op, more = inside.get(own, ("", ""))
        return _operand(more, int(index[1])) if op == "tuple" else ""

    op, more = body.get(counter(body, next(reversed(body), "")), ("", ""))
    step = _constant(body, _operand(more, 1)) if op == "add" else None
    first = _constant(outer, counter(outer, _operand(rest, 0)))
    end = _constant(condition, _operand(test, 1))
    return None if None in (first, end) or not step else max(0, -((first - end) // step))


def _operand(rest: str, index: int) -> str:
    """The name of an operand, from what follows an operation's bracket; "" where there is none."""
    names = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
    return names[index] if index < len(names) else ""


def _constant(inside: dict, own: str) -> int | None:
    """The integer that a name stands for, through copies."""
    op, more = inside.get(own, ("", ""))
    if op == "copy":
        return _constant(inside, _operand(more, 0))
    return int(more.split(")")[0]) if op == "constant" and more[:1].isdigit() else None


def _overlaps(operations: list, index: int, own: str, op: str) -> bool:
    """Whether work is scheduled between an operation's start and its end.

    What tpu7x's sparse cores do starts without an operand; an update gives it, and there it begins.
    """
    if not op.endswith(("-start", "-update")):
        return False
    named = re.compile(rf"(?<![\w.\-]){re.escape(own)}(?![\w.\-])")
    work = False
    for after, (name, _, later, rest) in enumerate(operations[index + 1 :], index + 1):
        if later == "async-update" and _operand(rest, 0) == own and _operand(rest, 1):
            return _overlaps(operations, after, name, later)
        if later.endswith("-done") and named.search(rest):
            break
        work = work or later in _WORK
    return work


def _computations(text: str) -> tuple[dict[str, list], str]:
    """Operations (name, shape, op, the rest of the line) by computation, and which is the entry."""
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
