"""Every option of every command refuses wrong values in one line, before anything is written."""

import argparse
import importlib

import pytest
from PIL import Image

from composer_jax.cli import COMMANDS, Parser, main

pytestmark = pytest.mark.fast


def parsers(parser):
    """A parser and those of its tasks."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def options(command):
    parser = Parser(prog=command)
    importlib.import_module(f"composer_jax.commands.{command}").add_arguments(parser)
    for one in parsers(parser):
        for action in one._actions:
            if action.nargs != 0 and not isinstance(action, argparse._SubParsersAction):
                yield one, action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_type_that_refuses_what_it_cannot_be(command):
    from composer_jax import conditions

    values = {f"{o}{n}" for n in conditions.names() for o in ("", "own.")}
    values |= {f"{n}.negative" for n in conditions.names()}  # read by the condition itself
    for parser, action in options(command):
        if action.dest in values:
            continue
        assert action.type or action.choices, f"{command}: {action.dest} takes anything"
        with pytest.raises((ValueError, argparse.ArgumentError), match=r"^argument ") as refused:
            taken = parser._get_values(action, ["\0"] if action.nargs in ("+", "*") else [""])
            parser._check_value(action, taken)
            raise AssertionError(f"{command}: {action.dest} takes nothing as {taken!r}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["-1", "1.5", "9223372036854775808", "nan", "0x1", "", "1_000"])
@pytest.mark.parametrize(
    "words",
    ["sample --seed", "edit variation a.png --seed", "evaluate --seed", "evaluate --source-seed",
     "prepare scenes:4 --seed"],
)  # fmt: skip
def test_what_is_no_seed_is_refused(words, value, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words.split(), value, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "a whole number from 0 to 9223372036854775807" in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sample --out=", "--out: the value is ''"),
        ("sample --out OUT --previews -1", "--previews: the value is -1"),
        ("sample --out OUT --size 100000000", "--size: the value is 100000000; a whole number"),
        ("sample --out OUT --model=", "--model: the value is ''"),
        ("sample --out OUT --count 1e9", "--count: the value is '1e9'"),
        ("sample --out OUT --use depht", "did you mean 'depth'"),
        ("sample --out OUT --use depth,depth", "--use: 'depth,depth' names depth twice"),
        ("decompose a.png --out OUT --only depth,", "--only: no condition ''"),
        ("evaluate --out OUT --experiments alone,alone", "'alone,alone' names alone twice"),
        ("evaluate --out OUT --experiments alone,,pairs", "--experiments: the value is ''"),
        ("evaluate --out OUT --experiments pair", "did you mean 'pairs'?"),
        ("train --config scenes64 --workdir OUT --config.conditions depth,", "('depth', '')"),
        ("sample --out OUT --caption.window 0.6:0.2", "START:END with 0 <= START < END <= 1"),
        ("sample --out OUT --interval nan:1", "START:END"),
        ("sample --out /dev/null/x", "/dev/null is a file"),
        ("edit variation a.png --out /proc/none", "--out: /proc/none cannot be written"),
        ("compile --out /dev/null/x", "/dev/null is a file"),
        ("train --config scenes64 --workdir /dev/null/x", "/dev/null is a file"),
        ("train --config scenes64:smoke --workdir OUT --config.dtype int8", "one of float32"),
        ("train --config scenes64:smoke --workdir OUT --config.seed", "wants a value"),
        (
            "train --config scenes64:smoke --workdir OUT --config.mesh.data=3",
            "mesh {'data': 3, 'fsdp': 1, 'tensor': 1} is for 3 devices; there is 1",
        ),
        (
            "train --config scenes64:smoke --workdir OUT --config.mesh.fsdp=2",
            "'fsdp': 2, 'tensor': 1} is for a multiple of 2 devices; there is 1",
        ),
        (
            "train --config scenes64:smoke --workdir OUT --config.optimizer.betas=.9",
            "a list of 2 values, each a number at least 0, below 1, is wanted",
        ),
        ("prepare scenes:99999999999999999999 --out OUT", "COUNT of scenes:COUNT"),
        ("prepare folder: --out OUT", "lacks what comes after folder:"),
        ("plan --config scenes64 --topology here --images 0", "--images: the value is 0"),
        ("plan --config scenes64 --topology here --price nan", "--price: the value is nan"),
        ("plan --config scenes64 --topology here --batch many", "--batch: the value is 'many'"),
        ("plan --config scenes64 --topology here --json /dev/null/x", "--json: /dev/null"),
        ("ema OUT --length 1e-300 --out OUT", "--length: the value is 1e-300"),
        ("ema OUT --length .1 --out OUT", "OUT does not exist; the workdir of a run is wanted"),
        ("ema /dev/null --length .1 --out OUT", "/dev/null is a file; the workdir of a run"),
        ("sweep --config ablations/ema --out OUT --jobs 0", "--jobs: the value is 0"),
        ("quickstart --config scenes64:nosuch --out OUT", "no variant 'nosuch'"),
    ],
)
def test_a_wrong_value_is_named_before_the_work(words, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([word.replace("OUT", str(out)) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert says.replace("OUT", str(out)) in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    "words",
    ["prepare folder:IN --out IN", "evaluate --source folder:IN --out IN/../in",
     "sample --caption cone --model IN --out IN", "evaluate --model IN --out IN",
     "sample --caption cone --guide IN --autoguidance 2 --out IN",
     "edit translation IN/a.png --caption cone --model IN --out IN/.",
     "train --config scenes64:smoke --config.source=folder:IN --workdir IN",
     "train --config scenes64:smoke --config.held_out=folder:IN --workdir IN/",
     "train --config scenes64:smoke --config.source=2*cache:x+cache:IN --workdir IN"],
)  # fmt: skip
def test_a_folder_that_is_read_is_no_output(words, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    assert main(words.replace("IN", str(folder)).split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is what is read; give another place to write to" in error
    assert [path.name for path in folder.iterdir()] == ["a.png"]


@pytest.mark.parametrize("command", ["sample", "evaluate", "compile"])
def test_every_setting_is_read_from_the_command_line(command):
    given = {"steps": "2", "batch": "1", "eta": "0.5", "solver": "ddim"}
    read = {"steps": 2, "batch": 1, "eta": 0.5, "solver": "ddim"}
    found = {
        action.dest: parser._get_value(action, given[action.dest])
        for parser, action in options(command)
        if action.dest in given
    }
    assert found == read
