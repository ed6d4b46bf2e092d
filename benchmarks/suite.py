"""Where the time of the tests goes: tracing, lowering, compiling and running, by file.

    python benchmarks/suite.py [--other PATH] [--parts one,mesh] [--json FILE] [-- PYTEST ARGUMENTS]

Runs the tests as `make test` does, two workers, cold caches, and prints a line for each file: its
seconds, of which tracing, lowering and compiling (or taking from the cache on disk); how many
programs were compiled, how many of them were taken from that cache; in the last line how many of
all programs differ, and the most memory that all processes had together (proportional set size).
PATH is another checkout, with an environment of its own, that takes its turn first. Commands that
tests start are processes of their own, and their time counts as running.

It is also the plugin of pytest that notes this, one JSON line for each file and worker.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
HIT = "/jax/compilation_cache/cache_hits"


def union(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by spans, which may lie within each other."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Notes:
    """What JAX does during the tests of a file, written down after its last one."""

    def __init__(self):
        self.file, self.tests = None, {}
        self.forget()

    def forget(self):
        self.spans, self.hits, self.keys = defaultdict(list), 0, []

    def listen(self):
        import jax
        from jax._src import compilation_cache

        def spent(event, seconds, **_):
            if event in STAGES:
                now = time.time()
                self.spans[STAGES[event]].append((now - seconds, now))

        def happened(event, **_):
            self.hits += event == HIT

        key_of = compilation_cache.get_cache_key

        def noted(*args, **options):
            self.keys.append(key_of(*args, **options))
            return self.keys[-1]

        compilation_cache.get_cache_key = noted
        jax.monitoring.register_event_duration_secs_listener(spent)
        jax.monitoring.register_event_listener(happened)

    def write(self):
        if self.file is None:
            return
        line = {stage: union(self.spans[stage]) for stage in STAGES.values()}
        line |= {"file": self.file, "seconds": sum(self.tests.values()), "tests": self.tests}
        line |= {"compiled": len(self.spans["compile"]), "hits": self.hits, "keys": self.keys}
        with open(Path(os.environ["SUITE_NOTES"]) / f"{os.getpid()}.jsonl", "a") as out:
            out.write(json.dumps(line) + "\n")
        self.file, self.tests = None, {}
        self.forget()

    def pytest_runtest_protocol(self, item):
        file = item.nodeid.split("::")[0]
        if file != self.file:
            self.write()
            self.file = file

    def pytest_runtest_logreport(self, report):
        test = report.nodeid.split("::", 1)[1]
        self.tests[test] = self.tests.get(test, 0.0) + report.duration

    def pytest_sessionfinish(self):
        self.write()


def pytest_configure(config):
    """As a plugin; xdist's controller runs no test."""
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        return
    notes = Notes()
    notes.listen()
    config.pluginmanager.register(notes)


def memory(root: int) -> int:
    """Bytes of a process and all that it started, shared pages counted once."""
    parents, children = {}, defaultdict(list)
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                )
        except OSError:
            continue
    for pid, parent in parents.items():
        children[parent].append(pid)
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        todo += children[pid]
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def run(root: Path, devices: int | None, args: list[str]) -> dict:
    """Seconds, peak of memory and the notes of the files of one run of a checkout's tests."""
    with tempfile.TemporaryDirectory(prefix="composer-suite-") as folder:
        env = {**os.environ, "SUITE_NOTES": folder, "XDG_CACHE_HOME": f"{folder}/cache"}
        env["PYTHONPATH"] = str(Path(__file__).parent)
        if devices:
            env["COMPOSER_TEST_DEVICES"] = str(devices)
        command = [root / ".venv/bin/python", "-m", "pytest", "-p", "suite", "-n", "2", "-q"]
        command += ["--dist", "loadfile", "--no-loadscope-reorder", *args]
        start, peak = time.perf_counter(), 0
        with subprocess.Popen(command, cwd=root, env=env) as child:
            done = threading.Event()

            def watch():
                nonlocal peak
                while not done.wait(1.0):
                    peak = max(peak, memory(child.pid))

            thread = threading.Thread(target=watch)
            thread.start()
            child.wait()
            done.set()
            thread.join()
        seconds = time.perf_counter() - start
        lines = [
            json.loads(line)
            for file in Path(folder).glob("*.jsonl")
            for line in file.read_text().splitlines()
        ]
    return {"seconds": seconds, "peak": peak, "rc": child.returncode, "files": lines}


def table(name: str, result: dict) -> None:
    head = ("seconds", "trace", "lower", "compile", "rest", "compiled", "from disk")
    print(f"\n{name}: {result['seconds']:.0f} s, {result['peak'] / 1e9:.2f} GB")
    print(f"{'file':44}" + "".join(f"{word:>10}" for word in head))
    totals = [0.0] * len(head)
    for line in sorted(result["files"], key=lambda line: -line["seconds"]):
        stages = [line[stage] for stage in STAGES.values()]
        rest = line["seconds"] - sum(stages)
        row = [line["seconds"], *stages, rest, line["compiled"], line["hits"]]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        print(f"{line['file']:44}" + "".join(f"{value:10.0f}" for value in row))
    print(f"{'all':44}" + "".join(f"{value:10.0f}" for value in totals))
    keys = [key for line in result["files"] for key in line["keys"]]
    print(f"{len(set(keys))} programs differ, of {len(keys)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=Path, help="a checkout that takes its turn first")
    parser.add_argument("--parts", default="one,mesh", help="one device, meshes; default: both")
    parser.add_argument("--json", type=Path, help="write all that was noted, with single tests")
    parser.add_argument("rest", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    results = {}
    if args.other:
        results["other"] = run(args.other.resolve(), None, args.rest)
    for part in args.parts.split(","):
        if part not in ("one", "mesh"):
            parser.error(f"--parts {part}; choose from one, mesh")
        results[part] = run(HERE, 8 if part == "mesh" else None, args.rest)
    for name, result in results.items():
        table(name, result)
    if args.json:
        args.json.write_text(json.dumps(results))
    sys.exit(max(result["rc"] for result in results.values()))


if __name__ == "__main__":
    main()
