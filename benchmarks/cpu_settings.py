"""What the settings that commands take are worth to a train step on CPU: huge pages for malloc, and
then fused outputs, too.

    python benchmarks/cpu_settings.py

One process each way, in turn, three times; prints the median step time of each, and ratios.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from composer_jax.cli import HUGE_PAGES, XLA_OPTIONS

RUNS = 3
WAYS = {
    "neither": {"GLIBC_TUNABLES": "", "XLA_FLAGS": ""},
    "huge pages": {"GLIBC_TUNABLES": HUGE_PAGES, "XLA_FLAGS": ""},
    "both": {"GLIBC_TUNABLES": HUGE_PAGES, "XLA_FLAGS": XLA_OPTIONS},
}


def main() -> None:
    times = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(RUNS):
            for name, settings in WAYS.items():
                command = [sys.executable, __file__, "step", folder]
                environment = {**os.environ, **settings}
                environment["JAX_COMPILATION_CACHE_DIR"] = folder  # compiled once, not three times
                printed = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                )
                times[name].append(float(printed.stdout.split()[-1]))
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    for name, seconds in medians.items():
        ratio = seconds / medians["neither"]
        print(f"{name:12} {seconds * 1e3:6.0f} ms a step of 32 images, ratio {ratio:.2f}")


def step(workdir: Path) -> None:
    """Prints the median seconds of twelve steps of `scenes64:cpu`."""
    from composer_jax.commands.train import train
    from composer_jax.training.config import load_config

    steps = ["source=scenes:64", "steps=15", "log_every=1", "sample_every=0"]
    run = Path(tempfile.mkdtemp(dir=workdir))
    train(load_config("scenes64:cpu", steps), run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(float(np.median([32 / row["images_per_second"] for row in rows[3:]])))


if __name__ == "__main__":
    step(Path(sys.argv[2])) if sys.argv[1:2] == ["step"] else main()
