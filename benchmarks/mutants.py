"""Do the tests notice code that is wrong? The same mutants, for this checkout's tests and others'.

    .venv/bin/python -m pip install cosmic-ray coverage   # coverage in the other checkout, too
    .venv/bin/python benchmarks/mutants.py --other PATH --out FOLDER [--count 64] [--seed 30]

Draws places of this project's mathematics at random and one mutation of cosmic-ray's at each, of
those that can be made in both checkouts; what changes annotations only, or compares by `==` where
`is` stood, is none. Each is made in copies of the two checkouts, whose tests run with `-x`: first
the mirrored file, then all others that run the mutated lines, which is told by coverage (each
suite is run once for that). Results are lines of FOLDER/mutants.jsonl, and a next call goes on
from them. A table of both numbers, and every survivor, is printed at the end.

It is also the plugin of pytest that tells coverage which file is running.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, zip_longest
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
ROOMS = (
    "diffusion/*.py",
    "conditions/*.py",
    "sampling/rows.py",
    "sampling/job.py",
    "training/step.py",
    "training/state.py",
    "models/composer.py",
)
WITHOUT_EFFECT = ("Is_Eq", "IsNot_NotEq")  # on None, which is all that is compared so
NOT_ASKED = ("RemoveDecorator", "VariableReplacer", "VariableInserter")  # speed, or need arguments
RC = """[run]
data_file = {folder}/.coverage
parallel = true
context = ${{COVERED_BY-}}
include =
    {files}
"""
START = "import coverage; coverage.process_startup()\n"  # in processes that tests start
NO_TESTS = 5  # pytest's code where all tests are of the other part
LIMIT = 60.0  # seconds; and three times what the tests took unmutated


class Covered:
    """Tells coverage, also that of processes that tests start, which file of tests is running."""

    def __init__(self):
        import coverage

        self.coverage = coverage.Coverage(config_file=os.environ["COVERED_RC"], data_suffix=True)
        self.coverage.start()
        self.file, self.seconds = None, defaultdict(float)

    def pytest_runtest_protocol(self, item):
        file = item.nodeid.split("::")[0]
        if file != self.file:
            self.file = os.environ["COVERED_BY"] = file
            os.environ["COVERAGE_PROCESS_START"] = os.environ["COVERED_RC"]
            self.coverage.switch_context(file)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid.split("::")[0]] += report.duration

    def pytest_sessionfinish(self):
        self.coverage.stop()
        self.coverage.save()
        seconds = Path(os.environ["COVERED_RC"]).parent / f"seconds-{os.getpid()}.json"
        seconds.write_text(json.dumps(self.seconds))


def pytest_configure(config):
    """As a plugin; xdist's controller runs no test."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Covered())


def environment(root: Path, folder: Path, devices: str | None) -> dict[str, str]:
    """For the tests of a checkout; what is compiled is kept for the next mutant."""
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    return env | ({"COMPOSER_TEST_DEVICES": devices} if devices else {})


def parts(root: Path) -> list[str | None]:
    """The numbers of devices that the tests of a checkout are run with, one after the other."""
    split = "COMPOSER_TEST_DEVICES" in (root / "tests/conftest.py").read_text()
    return [None, "8"] if split else [None]


def read_map(root: Path, run: Path) -> dict:
    """{"lines": {file: {line: [tests' files]}}, "seconds": {test's file: s}} of a covered run."""
    from coverage import CoverageData
    from coverage.exceptions import DataError

    seconds, lines = {}, defaultdict(lambda: defaultdict(set))
    for file in run.glob("seconds-*.json"):
        seconds |= json.loads(file.read_text())
    for file in run.glob(".coverage.*"):
        data = CoverageData(basename=str(file))
        try:
            data.read()
        except DataError:  # of a process that a test killed while it wrote
            continue
        for path in data.measured_files():
            for line, tests in data.contexts_by_lineno(path).items():
                lines[str(Path(path).relative_to(root))][line] |= set(tests) - {""}
    sets = {path: {at: sorted(of) for at, of in rows.items()} for path, rows in lines.items()}
    return {"lines": sets, "seconds": seconds}


def map_tests(root: Path, folder: Path) -> list[dict]:
    """For each part of a suite what `read_map` returns; a suite is run where no map is there."""
    maps = []
    for devices in parts(root):
        run = folder / f"covered-{devices or 1}"
        if not (run / "map.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir(parents=True)
            files = "\n    ".join(str(root / "composer_jax" / room) for room in ROOMS)
            (run / "rc").write_text(RC.format(folder=run, files=files))
            (run / "sitecustomize.py").write_text(START)
            (run / "mutants.py").write_text(Path(__file__).read_text())
            env = environment(root, folder, devices) | {"COVERED_RC": str(run / "rc")}
            env["PYTHONPATH"] = f"{run}:{root}"
            command = [root / ".venv/bin/python", "-m", "pytest", "-p", "mutants", "-n", "2"]
            subprocess.run([*command, "--dist", "loadfile"], cwd=root, env=env, check=True)
            (run / "map.json").write_text(json.dumps(read_map(root, run)))
        maps.append(json.loads((run / "map.json").read_text()))
    return maps


def bare(source: str) -> str:
    """The syntax of a source, without annotations and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = None if isinstance(node, ast.arg) else ast.Constant(None)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


def around(source: str, row: int) -> tuple[range, range]:
    """Lines of the innermost statement at a line, of compound ones the head, and of the innermost
    function, or else of the outermost statement."""

    def first(node):
        return min([node, *getattr(node, "decorator_list", ())], key=lambda n: n.lineno).lineno

    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    within = [node for node in statements if first(node) <= row <= node.end_lineno]
    inner = max(within, key=first)
    end = inner.body[0].lineno if hasattr(inner, "body") else inner.end_lineno + 1
    functions = [node for node in within if isinstance(node, ast.FunctionDef)]
    outer = max(functions, key=first) if functions else within[0]
    return range(first(inner), end), range(first(outer), outer.end_lineno + 1)


def in_other(source: str, mutated: str, other: str, row: int) -> str | None:
    """The other checkout's source with the same mutation; None where its function differs."""
    rows = around(source, row)[1]
    cut = slice(rows.start - 1, rows.stop - 1)
    old = "\n".join(source.split("\n")[cut])
    new = "\n".join(mutated.split("\n")[cut])
    same = len(mutated.split("\n")) == len(source.split("\n")) and other.count(old) == 1
    return other.replace(old, new) if same else None


def draw(seed: int, other: Path):
    """Mutants, a room after the other: (file, a line that tells it, {checkout: its source})."""
    from cosmic_ray import mutating, plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    places = defaultdict(lambda: defaultdict(list))  # by room, then by file and position
    for file in sorted(file for room in ROOMS for file in (HERE / "composer_jax").glob(room)):
        tree = get_ast(file.read_text())
        for name in plugins.operator_names():
            if name.endswith(WITHOUT_EFFECT + NOT_ASKED):
                continue
            operator, occurrence = plugins.get_operator(name)(), 0
            for node in ast_nodes(tree):
                for start, _ in operator.mutation_positions(node):
                    places[file.parent.name][file, start].append((name, occurrence))
                    occurrence += 1
    rng = random.Random(seed)
    orders = [rng.sample(sorted(places[room]), len(places[room])) for room in sorted(places)]
    for file, start in (at for turn in zip_longest(*orders) for at in turn if at):
        name, occurrence = rng.choice(places[file.parent.name][file, start])
        source, path = file.read_text(), str(file.relative_to(HERE))
        mutated = mutating.mutate_code(source, plugins.get_operator(name)(), occurrence)
        if bare(mutated) == bare(source) or not (other / path).exists():
            continue
        there = in_other(source, mutated, (other / path).read_text(), start[0])
        if there is not None:
            was, is_ = (text.split("\n")[start[0] - 1].strip() for text in (source, mutated))
            mutant = f"{path}:{start[0]}:{start[1]} {name.split('/')[-1]}: {was} -> {is_}"
            yield path, mutant, {"here": mutated, "other": there}


def chosen(found: dict, path: str, source: str, row: int) -> list[str]:
    """The files of tests that run a line: the mirrored one, then the quickest."""
    lines = found["lines"].get(path, {})
    tests = set()
    for rows in (*around(source, row), range(1, 10**6)):
        tests = tests or {test for at in rows for test in lines.get(str(at), ())}
    mirrored = path.replace("composer_jax", "tests").replace(".py", "_test.py")
    return sorted(tests, key=lambda test: (test != mirrored, found["seconds"].get(test, 0.0)))


def killer(copy: Path, folder: Path, python: Path, maps: list, path: str, code: str) -> str | None:
    """The test that notices a mutant, None where none does. The source is as before afterwards."""
    source = (copy / path).read_text()
    pairs = zip(source.split("\n"), code.split("\n"), strict=True)
    row = next(at for at, (was, is_) in enumerate(pairs, 1) if was != is_)
    (copy / path).write_text(code)
    try:
        for devices, found in zip(parts(copy), maps, strict=True):
            tests = chosen(found, path, source, row)
            if not tests:
                continue
            seconds = LIMIT + 3 * sum(found["seconds"].get(test, 0.0) for test in tests)
            with subprocess.Popen(
                [python, "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", *tests],
                cwd=copy,
                env=environment(copy, folder, devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            ) as child:
                try:
                    output, _ = child.communicate(timeout=seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    return f"no end after {seconds:.0f} s"
            if child.returncode not in (0, NO_TESTS):
                told = (row for row in output.splitlines() if row.startswith(("FAILED", "ERROR")))
                return next(told, f"exit code {child.returncode}")[:150]
    finally:
        (copy / path).write_text(source)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="a checkout with its .venv")
    parser.add_argument("--out", type=Path, required=True, help="folder of maps and results")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    args = parser.parse_args()
    roots, out = {"here": HERE, "other": args.other.resolve()}, args.out.resolve()
    maps = {name: map_tests(root, out / name) for name, root in roots.items()}
    results = out / "mutants.jsonl"
    lines = map(json.loads, results.read_text().splitlines() if results.exists() else ())
    known = {(line["mutant"], line["suite"]): line["killer"] for line in lines}
    copies = SimpleQueue()
    for job in range(args.jobs):
        for name, root in roots.items():
            copy = out / f"copy-{job}" / name
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        copies.put(out / f"copy-{job}")

    def judge(name: str, path: str, mutant: str, code: str) -> None:
        copy, start, python = copies.get(), time.monotonic(), roots[name] / ".venv/bin/python"
        found = killer(copy / name, out / name, python, maps[name], path, code)
        copies.put(copy)
        known[mutant, name] = found
        line = {"mutant": mutant, "suite": name, "killer": found}
        with results.open("a") as file:
            file.write(json.dumps(line | {"seconds": round(time.monotonic() - start)}) + "\n")

    drawn = list(islice(draw(args.seed, roots["other"]), args.count))
    todo = [
        (name, path, mutant, code[name])
        for name in roots
        for path, mutant, code in drawn
        if (mutant, name) not in known
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(lambda each: judge(*each), todo), total=len(todo)))
    for name, root in roots.items():
        killed = sum(known[mutant, name] is not None for _, mutant, _ in drawn)
        print(f"{root}: {killed} of {len(drawn)} killed")
    for _, mutant, _ in drawn:
        lives = [name for name in roots if known[mutant, name] is None]
        if lives:
            print(f"lives {', '.join(lives)}: {mutant}")


if __name__ == "__main__":
    main()
