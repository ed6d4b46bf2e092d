"""Do the tests notice code that is wrong? The same mutants, for this checkout's tests and others'.

    .venv/bin/python -m pip install cosmic-ray coverage   # coverage in the other checkout, too
    .venv/bin/python benchmarks/mutants.py --other PATH --out FOLDER [--count 64] [--seed 30]

Draws places of this project's mathematics at random and one mutation of cosmic-ray's at each, of
those that can be made in both checkouts; what changes annotations only, or compares by `==` where
`is` stood, is none. Each is made in copies of the two checkouts: it meets the mirrored file of
tests alone, and then, together with others that lived, all tests that run the mutated lines, which
is told by coverage (each suite is run once for that). Results are lines of FOLDER/mutants.jsonl,
and a next call goes on from them. Both numbers, and every survivor, are printed at the end.

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
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, zip_longest
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
PYTEST = ("-m", "pytest", "-rfE", "-p", "no:cacheprovider")
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


def around(source: str, row: int) -> tuple[range, range | None]:
    """Lines of the innermost function at a line, or else of the outermost statement; and, in the
    body of a function, lines of the innermost statement, of compound ones the head."""

    def first(node):
        return min([node, *getattr(node, "decorator_list", ())], key=lambda n: n.lineno).lineno

    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    within = [node for node in statements if first(node) <= row <= node.end_lineno]
    functions = [node for node in within if isinstance(node, ast.FunctionDef)]
    if not functions:
        return range(first(within[0]), within[0].end_lineno + 1), None
    outer, inner = max(functions, key=first), max(within, key=first)
    rows = range(first(outer), outer.end_lineno + 1)
    if row < outer.body[0].lineno:
        return rows, None
    end = inner.body[0].lineno if hasattr(inner, "body") else inner.end_lineno + 1
    return rows, range(first(inner), end)


def in_other(source: str, mutated: str, other: str, row: int) -> str | None:
    """The other checkout's source with the same mutation; None where its function differs."""
    rows, _ = around(source, row)
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
        try:
            without_effect = bare(mutated) == bare(source)
        except SyntaxError:  # no mutant of a program
            continue
        if without_effect or not (other / path).exists():
            continue
        there = in_other(source, mutated, (other / path).read_text(), start[0])
        if there is not None:
            was, is_ = (text.split("\n")[start[0] - 1].strip() for text in (source, mutated))
            mutant = f"{path}:{start[0]}:{start[1]} {name.split('/')[-1]}: {was} -> {is_}"
            yield path, mutant, {"here": mutated, "other": there}


def changed(was: str, code: str) -> dict[int, str]:
    """The lines that a mutation changes, by number."""
    pairs = zip(was.split("\n"), code.split("\n"), strict=True)
    return {at: line for at, (old, line) in enumerate(pairs, 1) if old != line}


class Suite:
    """The tests of a checkout, what they cover, and copies of it to change."""

    def __init__(self, name: str, root: Path, out: Path, jobs: int):
        self.name, self.root, self.folder = name, root, out / name
        self.python = root / ".venv" / "bin" / "python"
        self.parts, self.maps = parts(root), map_tests(root, self.folder)
        self.copies = SimpleQueue()
        for job in range(jobs):
            copy = self.folder / f"copy-{job}"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            self.copies.put(copy)

    def source(self, path: str) -> str:
        return (self.root / path).read_text()

    def covering(self, path: str, code: str) -> list[list[str]]:
        """For each part of the suite the files of tests that run what a mutant changes."""
        source = self.source(path)
        function, statement = around(source, min(changed(source, code)))
        found = []
        for covered in self.maps:
            lines, seconds = covered["lines"].get(path, {}), covered["seconds"]
            # what runs at import is every test's that runs any of the file
            ways = (statement, function) if statement else (map(int, lines),)
            tests: set[str] = set()
            for rows in ways:
                tests = tests or {test for at in rows for test in lines.get(str(at), ())}
            found.append(sorted(tests, key=lambda test: seconds.get(test, 0.0)))
        return found

    def run(self, files: dict[str, str], tests: list[list[str]], *options: str) -> list[str]:
        """The tests that fail where files are other ones; `tests`: files, for each part."""
        copy, failed = self.copies.get(), []
        for path, code in files.items():
            (copy / path).write_text(code)
        for devices, covered, some in zip(self.parts, self.maps, tests, strict=True):
            if some and not (failed and "-x" in options):
                seconds = LIMIT + 3 * sum(covered["seconds"].get(test, 0.0) for test in some)
                env = environment(copy, self.folder, devices)
                command = [self.python, *PYTEST, *options, *some]
                failed += run_tests(command, copy, env, seconds)
        for path in files:
            (copy / path).write_text(self.source(path))
        self.copies.put(copy)
        return failed


def run_tests(command: list, folder: Path, env: dict, seconds: float) -> list[str]:
    """The tests that failed, a line for each, or one for a run that came to no proper end."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            output, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return [f"no end after {seconds:.0f} s"]
    if child.returncode in (0, NO_TESTS):
        return []
    told = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return told or [f"exit code {child.returncode}"]


def together(suite: Suite, mutants: dict[str, tuple[str, str]]) -> list[dict[str, tuple]]:
    """Mutants in groups, no two of which change the same line."""
    groups: list[dict[str, tuple]] = []
    for mutant, (path, code) in mutants.items():
        rows = changed(suite.source(path), code).keys()
        for group in groups:
            others = [changed(suite.source(path), c) for p, c in group.values() if p == path]
            if not any(rows & other.keys() for other in others):
                group[mutant] = path, code
                break
        else:
            groups.append({mutant: (path, code)})
    return groups


def judge(suite: Suite, mutants: dict[str, tuple[str, str]], told) -> None:
    """Calls `told(mutant, killer)` for each, the killer None where it lives.

    Each alone meets the file of tests that mirrors its own; what lives meets all other tests that
    cover it together with the rest, and, where one fails, that one's file alone again.
    """

    def first(mutant: str) -> str | None:
        path, code = mutants[mutant]
        mirrored = path.replace("composer_jax", "tests").replace(".py", "_test.py")
        tests = [[mirrored] if (suite.root / mirrored).exists() else []] * len(suite.parts)
        killer = next(iter(suite.run({path: code}, tests, "-x")), None)
        if killer:
            told(mutant, killer)
        return killer

    with ThreadPoolExecutor() as pool:
        killers = zip(mutants, pool.map(first, mutants), strict=True)
        left = {mutant: mutants[mutant] for mutant, killer in killers if not killer}
        for group in together(suite, left):
            files = {path: suite.source(path).split("\n") for path, _ in group.values()}
            for path, code in group.values():
                for row, line in changed(suite.source(path), code).items():
                    files[path][row - 1] = line
            covering = {mutant: suite.covering(*of) for mutant, of in group.items()}
            every = [list(dict.fromkeys(chain(*of))) for of in zip(*covering.values(), strict=True)]
            whole = {path: "\n".join(lines) for path, lines in files.items()}
            failed = suite.run(whole, every, "-n", "2", "--dist", "loadfile")

            def again(mutant, failed=failed, covering=covering):
                names = {line.split()[1].split("::")[0] for line in failed if "::" in line}
                tests = [
                    [test for test in of if not names or test in names] if failed else []
                    for of in covering[mutant]
                ]
                path, code = left[mutant]
                told(mutant, next(iter(suite.run({path: code}, tests, "-x")), None))

            list(pool.map(again, group))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="a checkout with its .venv")
    parser.add_argument("--out", type=Path, required=True, help="folder of maps and results")
    parser.add_argument("--count", type=int, default=64, help="how many mutants")
    parser.add_argument("--seed", type=int, default=30, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    args = parser.parse_args()
    if not (args.other / ".venv" / "bin" / "python").is_file():
        parser.error(f"{args.other} has no .venv; run `make .venv/installed` there")
    roots, out = {"here": HERE, "other": args.other.resolve()}, args.out.resolve()
    results = out / "mutants.jsonl"
    lines = map(json.loads, results.read_text().splitlines() if results.exists() else ())
    known = {(line["mutant"], line["suite"]): line["killer"] for line in lines}
    drawn = list(islice(draw(args.seed, roots["other"]), args.count))
    for name, root in roots.items():
        todo = {m: (path, code[name]) for path, m, code in drawn if (m, name) not in known}
        bar = tqdm(total=len(todo), desc=str(root))

        def told(mutant, killer, name=name, bar=bar):
            known[mutant, name] = killer
            with results.open("a") as file:
                line = {"mutant": mutant, "suite": name, "killer": killer}
                file.write(json.dumps(line) + "\n")
            bar.update()

        if todo:
            judge(Suite(name, root, out, args.jobs), todo, told)
    for name, root in roots.items():
        killed = sum(known[mutant, name] is not None for _, mutant, _ in drawn)
        print(f"{root}: {killed} of {len(drawn)} killed")
    for _, mutant, _ in drawn:
        lives = [name for name in roots if known[mutant, name] is None]
        if lives:
            print(f"lives {', '.join(lives)}: {mutant}")


if __name__ == "__main__":
    main()
