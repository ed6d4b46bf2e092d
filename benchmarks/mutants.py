"""Do the tests notice code that is wrong? The same mutants, for this checkout's tests and others'.

    .venv/bin/python -m pip install cosmic-ray
    .venv/bin/python benchmarks/mutants.py --other PATH --out FOLDER [--count 64] [--seed 30]

Draws places of this project's mathematics at random and one mutation of cosmic-ray's at each, of
those that can be made in both checkouts; what changes annotations only, or compares by `==` where
`is` stood, is none. Each is made in copies of the two checkouts: it meets the mirrored file of
tests alone; those that live meet the whole suite together, and one by one again the files in which
a test then fails. Results are lines of FOLDER/mutants.jsonl, and a next call goes on from them.
Both numbers, and every survivor, are printed at the end.
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
from itertools import chain, islice, repeat, zip_longest
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
PYTEST = ("-m", "pytest", "-rfE", "-p", "no:cacheprovider")
WORKERS = ("-n", "2", "--dist", "loadfile")
TOLD = ("FAILED", "ERROR")  # how pytest's line of a test that failed begins
NO_TESTS = 5  # pytest's code where all tests are of the other part
LIMIT, WHOLE = 1800.0, 7200.0  # seconds for a file of tests, and for all


def environment(root: Path, folder: Path, devices: str | None) -> dict[str, str]:
    """For the tests of a checkout; what is compiled is kept for the next mutant."""
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    return env | ({"COMPOSER_TEST_DEVICES": devices} if devices else {})


def parts(root: Path) -> list[str | None]:
    """The numbers of devices that the tests of a checkout are run with, one after the other."""
    split = "COMPOSER_TEST_DEVICES" in (root / "tests/conftest.py").read_text()
    return [None, "8"] if split else [None]


def bare(source: str) -> str:
    """The syntax of a source, without annotations and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = None if isinstance(node, ast.arg) else ast.Constant(None)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


def function_at(source: str, row: int) -> range:
    """Lines of the innermost function at a line, or else of the outermost statement."""

    def first(node):
        return min([node, *getattr(node, "decorator_list", ())], key=lambda n: n.lineno).lineno

    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    within = [node for node in statements if first(node) <= row <= node.end_lineno]
    functions = [node for node in within if isinstance(node, ast.FunctionDef)]
    outer = max(functions, key=first) if functions else within[0]
    return range(first(outer), outer.end_lineno + 1)


def in_other(source: str, mutated: str, other: str, row: int) -> str | None:
    """The other checkout's source with the same mutation; None where its function differs."""
    rows = function_at(source, row)
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
    """The tests of a checkout, and copies of it to change."""

    def __init__(self, root: Path, folder: Path, jobs: int):
        self.root, self.folder = root, folder
        self.python = root / ".venv" / "bin" / "python"
        self.parts, self.copies = parts(root), SimpleQueue()
        for job in range(jobs):
            copy = folder / f"copy-{job}"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            self.copies.put(copy)

    def source(self, path: str) -> str:
        return (self.root / path).read_text()

    def run(self, files: dict[str, str], tests: list[list[str]], seconds: float, *options: str):
        """For each part of the suite the tests that fail where files are other ones."""
        copy, failed = self.copies.get(), []
        for path, code in files.items():
            (copy / path).write_text(code)
        for devices, some in zip(self.parts, tests, strict=True):
            env = environment(copy, self.folder, devices)
            command = [self.python, *PYTEST, *options, *some]
            wanted = some and not ("-x" in options and any(failed))
            failed.append(run_tests(command, copy, env, seconds) if wanted else [])
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
    told = [line for line in output.splitlines() if line.startswith(TOLD)]
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
    """Calls `told(mutant, killer)` for each, the killer None where it lives."""

    def alone(mutant: str, tests: list[list[str]], seconds: float) -> str | None:
        path, code = mutants[mutant]
        return next(chain(*suite.run({path: code}, tests, seconds, "-x")), None)

    def first(mutant: str) -> str | None:
        mirrored = mutants[mutant][0].replace("composer_jax", "tests").replace(".py", "_test.py")
        tests = [mirrored] if (suite.root / mirrored).exists() else []
        killer = alone(mutant, [tests] * len(suite.parts), LIMIT)
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
            whole = {path: "\n".join(lines) for path, lines in files.items()}
            every = [["tests"]] * len(suite.parts)
            failed = suite.run(whole, every, WHOLE, *WORKERS)
            if without_end := [line for line in chain(*failed) if not line.startswith(TOLD)]:
                raise SystemExit(f"{suite.root}, {len(group)} mutants together: {without_end[0]}")
            again = [
                list(dict.fromkeys(line.split()[1].split("::")[0] for line in lines))
                for lines in failed
            ]
            if any(chain(*again)) and any(wrong := suite.run({}, again, WHOLE, *WORKERS)):
                raise SystemExit(f"without a mutant, too, there fail in {suite.root}: {wrong}")
            killers = pool.map(alone, group, repeat(again), repeat(WHOLE))
            for mutant, killer in zip(group, killers, strict=True):
                told(mutant, killer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="a checkout with its .venv")
    parser.add_argument("--out", type=Path, required=True, help="folder of copies and results")
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
            judge(Suite(root, out / name, args.jobs), todo, told)
    for name, root in roots.items():
        killed = sum(known[mutant, name] is not None for _, mutant, _ in drawn)
        print(f"{root}: {killed} of {len(drawn)} killed")
    for _, mutant, _ in drawn:
        lives = [name for name in roots if known[mutant, name] is None]
        if lives:
            print(f"lives {', '.join(lives)}: {mutant}")


if __name__ == "__main__":
    main()
