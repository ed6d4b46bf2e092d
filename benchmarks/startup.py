"""How long training takes to start, and what it needs, against another checkout of this project.

    python benchmarks/startup.py --other PATH [--size quick] [--runs 3]

PATH has an environment of its own (`make .venv/installed` there). Both checkouts take turns, each
in a process of its own. "quick": `composer train --config scenes64:quick`, its images prepared
before, from the command to the end of the first step; at first with empty caches, then once more.
"sd15": a UNet of Stable Diffusion 1.5's size on the same images, from the command until its state
is in memory, which has not grown for a second; and the most memory that the process had by then,
over the state's own.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CONFIG = """
from composer_jax.configs import scenes64
from composer_jax.models.unet import PRESETS

def get_config(variant=""):
    config = scenes64.get_config("quick")
    own = {"in_channels": 38, "out_channels": 6, "cross_attention_dim": 128}
    config.model.unet = PRESETS["sd15"].to_dict() | own
    return config
"""


class Start:
    """A checkout's command, and a folder of its own for caches, images and runs."""

    def __init__(self, name: str, root: Path, folder: Path):
        python = root / ".venv" / "bin" / "python"
        if not python.is_file():
            sys.exit(f"{python} is missing; run `make .venv/installed` in {root}")
        self.name, self.folder, self.count = name, folder, 0
        folder.mkdir()
        (folder / "sd15.py").write_text(CONFIG)
        self.command = [python, "-m", "composer_jax", "train"]
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}

    def forget(self) -> None:
        """Empties the caches of programs."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def run(self, config: str, until, *overrides: str) -> tuple[float, int]:
        """Seconds from the command until `until(workdir, pid)` holds, when it is killed, and the
        most memory that it had, in bytes."""
        self.count += 1
        workdir, told = self.folder / f"run{self.count}", self.folder / f"told{self.count}"
        options = [f"pools={self.folder / 'pools'}", "log_every=1", *overrides]
        words = ["--config", config, "--workdir", workdir, *(f"--config.{o}" for o in options)]
        start = time.perf_counter()
        with told.open("wb") as log:
            child = subprocess.Popen(  # elsewhere, or Python would take the package from here
                [*self.command, *words],
                stderr=log,
                stdout=log,
                env=self.environment,
                cwd=self.folder,
            )
            while not until(workdir, child.pid):
                if child.poll() is not None:
                    sys.exit(f"{self.name} ended:\n{told.read_text()}")
                time.sleep(0.02)
        seconds = time.perf_counter() - start
        peak = memory(child.pid, "VmHWM")
        child.send_signal(signal.SIGKILL)
        child.wait()
        shutil.rmtree(workdir)
        return seconds, peak


def memory(pid: int, what: str) -> int:
    """Bytes that /proc says a process has: VmRSS, now, or VmHWM, at most; 0 while it starts."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def stepped(workdir: Path, pid: int) -> bool:
    """The first step is logged."""
    log = workdir / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


def laid_out(size: int):
    """A condition: a state of `size` bytes is in memory, which has not grown for a second."""
    seen: list[tuple[float, int]] = []

    def holds(workdir: Path, pid: int) -> bool:
        now = time.perf_counter()
        seen.append((now, memory(pid, "VmRSS")))
        before = [held for at, held in seen if at < now - 1.0]
        return bool(before) and size <= seen[-1][1] <= 1.001 * before[-1]

    return holds


def row(what: str, found: dict[str, list[float]], unit: str) -> None:
    """Prints medians and the median ratio of pairs."""
    ratios = [a / b for a, b in zip(found["this"], found["other"], strict=True)]
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"{what:44s} {medians['this']:8.1f} {unit}, other {medians['other']:8.1f} {unit}, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def state_bytes() -> int:
    """What the state of the "sd15" run weighs: parameters, average and two moments, float32."""
    from ml_collections import ConfigDict

    from composer_jax.models.composer import Composer
    from composer_jax.models.initializers import abstract
    from composer_jax.storage.models import parameter_count
    from composer_jax.training.plan import composer_config

    space: dict = {}
    exec(CONFIG, space)
    config: ConfigDict = space["get_config"]()
    return 4 * 4 * parameter_count(abstract(Composer, *composer_config(config)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="the other checkout")
    parser.add_argument("--size", choices=("quick", "sd15"), help="one of the two")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = {"this": HERE, "other": args.other.resolve()}
        starts = {name: Start(name, root, Path(folder) / name) for name, root in roots.items()}
        for start in starts.values():  # prepares the images
            start.run("scenes64:smoke", stepped, "source=scenes:2000")
        if args.size != "sd15":
            first, again = ({name: [] for name in starts} for _ in (0, 1))
            for _ in range(args.runs):
                for name, start in starts.items():
                    start.forget()
                    first[name].append(start.run("scenes64:quick", stepped)[0])
                    again[name].append(start.run("scenes64:quick", stepped)[0])
            row("scenes64:quick, first step, empty caches", first, "s")
            row("scenes64:quick, first step, the second time", again, "s")
        if args.size != "quick":
            seconds, peaks = ({name: [] for name in starts} for _ in (0, 1))
            size = state_bytes()
            for _ in range(args.runs):
                for name, start in starts.items():
                    start.forget()
                    took, peak = start.run(str(start.folder / "sd15.py"), laid_out(size))
                    seconds[name].append(took)
                    peaks[name].append(peak / size)
            row("Stable Diffusion 1.5's size, state", seconds, "s")
            row("    peak memory / state", peaks, "")


if __name__ == "__main__":
    main()
