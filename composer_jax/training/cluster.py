"""Several processes as one job: how they meet, what each takes, and how they end together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from composer_jax.training.sharding import batch_sharding

log = logging.getLogger("composer_jax")
HEARTBEAT = 30  # seconds after which a silent process counts as lost
PROCESS, PROCESSES = "COMPOSER_PROCESS", "COMPOSER_PROCESSES"
COORDINATOR = "JAX_COORDINATOR_ADDRESS"


def join() -> None:
    """Joins the other processes of this job, if the environment says that there are any.

    COMPOSER_PROCESSES (how many), COMPOSER_PROCESS (which, from 0) and JAX_COORDINATOR_ADDRESS
    (HOST:PORT of the first) say it; COMPOSER_PROCESSES=auto leaves it to JAX, which knows TPU pods
    and Kubernetes; a SLURM step of several tasks is seen by itself. Comes before any other call of
    JAX. Raises ValueError where what they say is incomplete.
    """
    count = os.environ.get(PROCESSES, "")
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if count in ("", "1") and not (slurm and not count):
        return
    options: dict = {}
    if count.isdigit():
        index, address = os.environ.get(PROCESS, ""), os.environ.get(COORDINATOR, "")
        if not (index.isdigit() and int(index) < int(count) and address):
            raise ValueError(
                f"{PROCESSES}={count} asks for {COORDINATOR}=HOST:PORT and {PROCESS} from 0 to "
                f"{int(count) - 1}; they are {address!r} and {index!r}"
            )
        options = {"coordinator_address": address, "num_processes": int(count)}
        options["process_id"] = int(index)
    elif count not in ("", "auto"):
        raise ValueError(f"{PROCESSES} is {count!r}; a number of processes or auto is wanted")
    jax.distributed.initialize(**options, heartbeat_timeout_seconds=HEARTBEAT)
    if jax.process_index() == 0:
        log.info("%d processes, %d devices", jax.process_count(), jax.device_count())


def is_main() -> bool:
    """Whether this process is the one that prints, and writes what one alone writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process does what is inside before the others do, who then find its files."""
    if not is_main():
        multihost_utils.sync_global_devices("main first")
    yield
    if is_main():
        multihost_utils.sync_global_devices("main first")


def share(mesh: Mesh, batch: int) -> tuple[int, int]:
    """Which part of a global batch this process's devices take: (index, how many parts).

    Processes along the tensor axis take the same. Raises ValueError where the batch cannot be split
    over the mesh.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise ValueError(f"batch {batch} is not a multiple of the mesh's data x fsdp = {ways}")
    rows = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    starts = {row[0].indices(batch)[:2] for row in rows}
    first, last = min(start for start, _ in starts), max(stop for _, stop in starts)
    size = last - first
    if sum(stop - start for start, stop in starts) != size or first % size:
        raise ValueError("the devices of a process hold rows apart; reorder the mesh's axes")
    return first // size, batch // size


def gather(tree):
    """A tree of global arrays as numpy arrays, whole in every process; all must call it."""

    def whole(leaf):
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


class Stop:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts as usual.

    With several processes, JAX notes SIGTERM, and tells them all to stop after the same step.
    """

    def __init__(self):
        self._noted: int | None = None
        self._old: dict = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame) -> None:
        del frame
        self._noted = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() > 1:  # Ctrl-C reaches all of them; SIGTERM is what they agree by
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> int | None:
        """The signal by which to stop after `step`, or None; called after every step."""
        if jax.process_count() == 1:
            return self._noted
        if multihost_utils.reached_preemption_sync_point(step):
            return self._noted or signal.SIGTERM
        return None

    def __exit__(self, *error) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def leave(message: str) -> None:
    """Ends this process at once, with exit code 1: others of the job are gone.

    What JAX and Orbax do at an orderly end would wait for them for minutes.
    """
    print(f"composer: {message}", file=sys.stderr, flush=True)
    os._exit(1)
