"""What a run tells: metrics.jsonl, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from composer_jax.storage.metrics import read_metrics
from composer_jax.training.cluster import is_main
from composer_jax.training.hardware import chip_of
from composer_jax.utils.atomic import append_bytes, write_text, writing

log = logging.getLogger("composer_jax")


class NonFinite(FloatingPointError):
    """The loss or the gradient of `step` is not finite."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"{name} is {value} at step {step}; the last checkpoint is kept")
        self.step = step


class Log:
    """Metrics of steps, on the device until they are written as the mean over several steps.

    `waiting`: the steps since the last line, of a checkpoint's notes. A run that was cut at any
    step writes the lines that an uncut one writes.
    """

    def __init__(self, workdir: Path, start: int, steps: int, batch: int, waiting=()):
        self._path, self._batch, self.flops = workdir / "metrics.jsonl", batch, 0.0
        self._waiting: list[tuple[int, Mapping]] = [(step, row) for step, row in waiting]
        self._timed, self._since = 0, None
        if is_main():
            _cut_back(self._path, start)
            self._board = _Board(workdir / "tensorboard", start)
        self._bar = tqdm(
            total=steps, initial=start, unit="step", disable=not is_main(), smoothing=0.05
        )
        chip = chip_of(jax.devices()[0].device_kind)
        self._peak = chip.flops if chip else None
        if chip is None and jax.devices()[0].platform != "cpu" and is_main():
            kind = jax.devices()[0].device_kind
            log.warning("the peak of %r is not known; the log will have no utilisation", kind)

    def add(self, step: int, metrics: Mapping) -> None:
        """Keeps the metrics of a step, which may still be computed."""
        self._since = self._since or time.perf_counter()
        self._waiting.append((step, metrics))
        self._timed += 1
        self._bar.update()

    def waiting(self) -> list[tuple[int, dict[str, float]]]:
        """The steps not yet written, as numbers; raises `NonFinite` where one is not finite."""
        self._waiting = [(step, {k: float(v) for k, v in m.items()}) for step, m in self._waiting]
        for step, row in self._waiting:
            for name in ("loss", "grad_norm"):
                if not np.isfinite(row[name]):
                    raise NonFinite(step, name, row[name])
        return list(self._waiting)

    def write(self) -> None:
        """Writes the mean of the waiting steps as one line."""
        rows = [row for _, row in self.waiting()]
        seconds = time.perf_counter() - self._since
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        rate = self._batch * self._timed / seconds
        shown = {"loss": f"{mean['loss']:.4f}", "images/s": f"{rate:.0f}"}
        if self._peak and self.flops:
            # the compiled program is one device's
            mean["mfu"] = self.flops * self._timed / seconds / self._peak
            shown["mfu"] = f"{mean['mfu']:.1%}"
        self._bar.set_postfix(shown)
        self.scalars(self._waiting[-1][0], {**mean, "images_per_second": rate})
        self._waiting, self._timed, self._since = [], 0, time.perf_counter()

    @contextmanager
    def away(self):
        """What is done in here, once the steps so far are computed, takes none of their time."""
        jax.block_until_ready([row for _, row in self._waiting])
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line of its own, unless there is nothing to write."""
        if values and is_main():
            append_bytes(self._path, (json.dumps({"step": step, **values}) + "\n").encode())
            self._board.scalars(step, values)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()


class _Board:
    """A file of TensorBoard's events. tensorboardX's own writer has a thread and a queue, and who
    adds to the queue waits forever once the thread has met a full disk."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._add(Event(file_version="brain.Event:2"))
        if start:  # what comes later in older files is not shown
            self._add(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self._add(*(Event(step=step, summary=scalar(k, v)) for k, v in values.items()))

    def _add(self, *events) -> None:
        from tensorboardX.record_writer import masked_crc32c

        content = b""
        for event in events:
            event.wall_time = time.time()
            event = event.SerializeToString()
            for part in (struct.pack("<Q", len(event)), event):
                content += part + struct.pack("<I", masked_crc32c(part))
        append_bytes(self._path, content)


def _cut_back(path: Path, step: int) -> None:
    """Drops the lines that a restored run will write again."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(kept))
