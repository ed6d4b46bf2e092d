"""metrics.jsonl, the log of a training run, read back."""

from __future__ import annotations

import json
import logging
from pathlib import Path

log = logging.getLogger("composer_jax")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl that can be read, {} of names and numbers with a step;
    what cannot is logged."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
        return []
    if not texts:
        log.warning("%s is empty", path)
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = dict(json.loads(text))
            whole = all(isinstance(value, int | float) for value in (line["step"], *line.values()))
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            lines.append(line)
        else:
            log.warning("%s: line %d is damaged and left out", path, number)
    return lines
