"""Nothing that is typed is silently ignored: it acts, or is refused, or a line says so."""

import argparse
import importlib
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from composer_jax import conditions
from composer_jax.cli import COMMANDS, main
from composer_jax.commands import evaluate
from composer_jax.commands.unused import PARTS, check_conditions, tell_keys, tell_tools
from composer_jax.training.config import load_config

RED = ("--palette", "#d62828")
# (command, option): what else it needs; a test below meets each. All other options act alone.
BESIDE = {
    ("sample", "--use"): "--from",
    ("sample", "--from"): "--use",
    ("sample", "--previews"): "images to make",
    **{
        ("sample", f"--{name}.{part}"): f"--{name}" for name in conditions.names() for part in PARTS
    },
    **{("sample", f"--{name}.negative"): "--guidance" for name in conditions.names()},
    **{
        (command, option): partner
        for command in ("sample", "edit", "evaluate")
        for option, partner in (
            ("--guide", "--autoguidance"),
            ("--autoguidance", "--guide"),
            ("--eta", "--solver"),
            ("--steps-offset", "--spacing"),
            ("--shift", "the schedule flow"),
            ("--final", "--spacing"),
            ("--interval", "--guidance"),
            ("--rescale", "--guidance"),
            ("--segmenter", "instances"),
            ("--depth-weights", "depth"),
            ("--edge-weights", "sketch"),
        )
    },
    ("compile", "--eta"): "--solver",
    **{
        (command, f"--{prefix}{name}.{switch}"): f"--{prefix}{name}"
        for command, prefix in (("sample", ""), ("edit", ""), ("edit", "own."))
        for name in conditions.names()
        for switch in conditions.get(name).switches
    },
    **{("edit", f"--own.{name}"): "a task that asks" for name in conditions.names()},
    ("edit", "--border"): "--region",
    ("edit", "--vary"): "what is held",
    ("edit", "--hold"): "what is not given",
    ("edit", "--hold-second"): "what is not given",
    ("edit", "--seed"): "--eta",
    **{
        ("decompose", option): "--only"
        for option in ("--clip", "--segmenter", "--depth-weights", "--edge-weights")
    },
    ("evaluate", "--few"): "--experiments",
    ("sweep", "--jobs"): "runs to start",
    ("sweep", "--list"): "no --table",
    ("sweep", "--table"): "no --list",
    ("plan", "--images"): "an estimate",
    ("plan", "--price"): "an estimate",
    ("prepare", "--seed"): "what is drawn",
    ("prepare", "--crop"): "photos",
    ("prepare", "--flip"): "photos",
    ("convert", "--prediction"): "a UNet",
    ("convert", "--only"): "what is there",
}
PROGRAM = "--model --size --dtype --precision --batch --steps --solver"
SAMPLING = f"{PROGRAM} --seed --spacing --guidance"
ALONE = {
    "sample": f"--out --count --report {SAMPLING}",
    "edit": f"--out --count --strength --region --garment-region {SAMPLING}",
    "evaluate": f"--out --source --source-seed --count --seeds --experiments {SAMPLING}",
    "compile": f"--out --rows --values --guide {PROGRAM}",
    "decompose": "--out --only",
    "quickstart": "--out --config",
    "prepare": "--out --config --shard-size --verify",
    "train": "--config --workdir",
    "ema": "--length --step --out",
    "plan": "--config --topology --batch --json",
    "convert": "--out --to --dtype",
    "sweep": "--config --out",
}


def options_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options_of(sub)
        yield from (one for one in action.option_strings if one not in ("-h", "--help"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_known_to_act_or_to_need_another(command):
    """A new option is put into one of the tables above, and tested where it needs something."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"composer_jax.commands.{command}").add_arguments(parser)
    known = {*ALONE[command].split()} | {option for c, option in BESIDE if c == command}
    if command in ("sample", "edit"):
        known |= {f"--{name}" for name in conditions.names()}
    assert set(options_of(parser)) <= known


def typed(*words, **values):
    names = {f"{name}{part}": None for name in conditions.names() for part in ("", ".negative")}
    return Namespace(**{**names, **values}, typed=set(words))


@pytest.mark.parametrize("name", conditions.names())
@pytest.mark.parametrize("part", PARTS)
def test_how_a_condition_is_used_needs_its_value(name, part):
    option = f"--{name}.{part}"
    with pytest.raises(ValueError, match=rf"{option} is for the value of --{name} or --use {name}"):
        check_conditions(typed(option), ())
    with pytest.raises(ValueError, match=option):  # what is moved away from has no strength
        check_conditions(typed(option, **{f"{name}.negative": "x"}), ())
    check_conditions(typed(option), (name,))
    check_conditions(typed(option, **{name: "x"}), ())
    with pytest.raises(ValueError, match=f"{name} is given by --{name} and by --use"):
        check_conditions(typed(**{name: "x"}), (name,))


def test_tools_are_for_what_is_taken_from_images(caplog):
    tell_tools(typed("--depth-weights", "--edge-weights"), ["depth", "palette"], "no sketch")
    assert [one.message for one in caplog.records] == ["--edge-weights does nothing: no sketch"]


@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("held_out_every=5", "held_out=scenes:8"),
        ("snapshot_every=5", "ema_lengths=0.05,0.1"),
        ("sample_every=2", ""),
        ("init_any_process=True", "init_from=bundled"),
        ("profile_steps=500,510", "steps=1000"),
        ("optimizer.decay=0.5", "optimizer.schedule=cosine"),
        ("process.density=uniform", "process.schedule=flow"),
        ("sharding=(('kernel', 'fsdp'),)", "mesh.fsdp=2"),
        ("mesh.tensor=2", "sharding=(('kernel', 'tensor'),)"),
    ],
)
def test_keys_of_a_config_that_nothing_takes(caplog, key, beside):
    name = key.partition("=")[0]
    config = "scenes64_depth" if name == "sample_every" else "scenes64"
    more = {
        "optimizer.decay": ("optimizer.schedule=constant",),
        "process.density": ("process.schedule=sd",),
        "profile_steps": ("steps=400",),
    }.get(name, ())
    tell_keys(load_config(config, [key, *more]), [key, *more])
    assert [record.message.split(":")[0] for record in caplog.records] == [f"{name} does nothing"]
    caplog.clear()
    tell_keys(load_config("scenes64", [key, beside] if beside else [key]), [key])
    assert not caplog.records


@pytest.mark.parametrize(
    ("purpose", "acting", "idle"),
    [
        ("prepare", ["image_size=32", "clip_text.skip=0", "conditions=palette"], "steps=5"),
        ("plan", ["batch=8", "steps=5", "remat=blocks", "optimizer.name=muon"], "save_every=5"),
    ],
)
def test_keys_that_a_cache_or_a_plan_does_not_depend_on(caplog, purpose, acting, idle):
    config = load_config("scenes64", [*acting, idle])
    tell_keys(config, [*acting, idle], purpose)
    name = idle.partition("=")[0]
    assert [record.message.split(":")[0] for record in caplog.records] == [f"{name} does nothing"]


def test_an_evaluation_says_what_it_does_not_use(caplog):
    words = "--few", "--depth-weights", "--segmenter", "--edge-weights"
    pipe = Namespace(names=("depth", "instances", "sketch"))
    evaluate._tell_unused(typed(*words, source="scenes:8"), pipe, ["quality"])
    told = {record.message.split()[0] for record in caplog.records}
    assert told == {"--few", "--depth-weights", "--segmenter"}  # scenes know depth and instances
    caplog.clear()
    evaluate._tell_unused(typed(*words, source="folder:x"), pipe, ["pairs"])
    assert not caplog.records


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sample --sketch.strength 7", "--sketch.strength"),
        ("sample --caption.strength 0.5 --caption.negative grey", "--caption.strength is for"),
        ("sample --from @ --use palette --palette #fff", "palette is given by --palette and by"),
        ("sample --previews 0", "--previews"),
        ("sample --previews -1", "--previews"),
        ("sample --palette #fff --palette.strength 1.5", "strength"),
        ("sample --palette #fff --palette.window 0.1:0.2", "palette: window (0.1, 0.2) meets no"),
        ("sample --interval 0.6:0.9", "interval (0.6, 0.9) meets no evaluation"),
        ("sample --interval 0.6:0.9 --guidance 1", "interval (0.6, 0.9) meets no evaluation"),
        ("sample --steps-offset 1 --spacing karras", "steps_offset is 1; it is for leading"),
        ("sample --from @", "--from IMAGE and --use CONDITIONS go together"),
        ("sample --use palette", "--from IMAGE and --use CONDITIONS go together"),
        ("edit variation @ --border 3", "border is for region"),
        ("edit variation @ --vary depth", "vary names depth, which is not held"),
        ("edit variation @ --hold palette --palette #fff", "palette is given, so"),
        ("edit variation @ --hold palette --vary palette", "hold and vary are both given"),
        ("edit interpolation @ @ --hold palette --hold-second palette", "both name palette"),
    ],
)
def test_what_lacks_its_partner_is_refused_before_anything_is_written(
    run, photo, tmp_path, capsys, words, says
):
    command = [photo if word == "@" else word for word in words.split()]
    rest = ["--model", str(run), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*command, *rest]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sample --palette.negative #fff --guidance 1", "the negative palette does nothing"),
        ("sample --guidance 1 --rescale 0.5", "rescale does nothing"),
        ("sample --guidance 1 --interval 0:0.6", "interval does nothing"),
        ("sample --palette #fff --palette #000", "--palette is given more than once; the last"),
        ("sample --guide RUN", "--guide does nothing: --autoguidance is 1"),
        ("edit reconfiguration @ --palette #fff --seed 3", "seed does nothing"),
        ("edit variation @ --own.depth @", "--own.depth does nothing: variation did not ask"),
    ],
)
def test_what_the_rest_makes_idle_is_said_once(run, photo, tmp_path, caplog, words, says):
    table = {"@": photo, "RUN": str(run)}
    if "--own.depth" in words:
        grey = tmp_path / "grey.png"
        Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(grey)
        words = words.replace("--own.depth @", f"--own.depth {grey}")
    command = [table.get(word, word) for word in words.split()]
    rest = ["--model", str(run), "--steps", "2", "--count", "1", "--out", str(tmp_path / "out")]
    assert main([*command, *rest]) == 0
    assert [says in record.message for record in caplog.records].count(True) == 1
    assert (tmp_path / "out" / "0000.png").is_file()


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ("sweep --config ablations/stems --list --table", "--list and --table", 2),
        ("sweep --config ablations/stems --list --jobs 2", "--jobs does nothing", 0),
        ("sweep --config ablations/stems --list --config.seed=5", "--config.seed does nothing", 0),
        ("decompose @ @ --only palette", "two images have the same name", 2),
        ("decompose @ --only palette --depth-weights bundled", "--depth-weights does nothing", 0),
    ],
)
def test_other_commands(photo, tmp_path, caplog, capsys, words, says, code):
    command = [photo if word == "@" else word for word in words.split()]
    assert main([*command, "--out", str(tmp_path / "out")]) == code
    assert says in caplog.text + capsys.readouterr().err
