#!/usr/bin/env python3
"""Starts a command in several processes on this machine, as one job.

    python launch/local.py --processes 2 -- composer train --config scenes64:cpu --workdir runs/two
    python launch/local.py --processes 4 -- composer prepare folder:PHOTOS --out cache

Each gets COMPOSER_PROCESS, COMPOSER_PROCESSES and JAX_COORDINATOR_ADDRESS, as any other launcher
would set them. On CPU they talk by JAX's own collectives, so that what a cluster does can be tried
on a laptop; each has one device unless JAX_NUM_CPU_DEVICES says otherwise. On GPUs let one process
have them all, or set CUDA_VISIBLE_DEVICES by `--gpus`: process i gets the i-th share.

When one ends badly, the others are told to stop, killed after 20 s, and the exit code is its own.
SIGTERM and Ctrl-C go to all of them. `--dry-run` prints what would be started. Needs nothing but
Python.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from functools import partial

GRACE = 20  # seconds


def environment(index: int, count: int, port: int, gpus: int) -> dict[str, str]:
    """What one process is told."""
    told = {
        "COMPOSER_PROCESS": str(index),
        "COMPOSER_PROCESSES": str(count),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }
    if gpus:
        each = gpus // count
        mine = range(index * each, (index + 1) * each)
        told["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
    return told


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(children: list[subprocess.Popen]) -> int:
    """The exit code of the first that ends badly, the others being stopped; else 0."""

    def forward(number, frame):
        del frame
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    while True:
        codes = [child.poll() for child in children]
        bad = next((i for i, code in enumerate(codes) if code), None)
        if bad is not None:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.2)
    code = codes[bad]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    others = [child for child in children if child.poll() is None]
    stopping = "; stopping the others" if others else ""
    print(f"local.py: process {bad} {how}{stopping}", file=sys.stderr, flush=True)
    for child in others:
        child.terminate()
    until = time.monotonic() + GRACE
    for child in others:
        try:
            child.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
    return 128 - code if code < 0 else code


def main() -> int:
    """Starts the processes and waits for them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to share out (0)")
    parser.add_argument("--dry-run", action="store_true", help="print, start nothing")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what each runs")
    args = parser.parse_args()
    if args.processes < 1 or args.gpus % args.processes:
        parser.error("--processes is at least 1 and divides --gpus")
    port = free_port()
    told = [environment(i, args.processes, port, args.gpus) for i in range(args.processes)]
    if args.dry_run:
        for each in told:
            words = [f"{key}={value}" for key, value in each.items()]
            print(*words, shlex.join(args.command))
        return 0
    # in sessions of their own, or a terminal's Ctrl-C would reach them twice
    start = partial(subprocess.Popen, args.command, start_new_session=True)
    return wait([start(env={**os.environ, **each}) for each in told])


if __name__ == "__main__":
    sys.exit(main())
