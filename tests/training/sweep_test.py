"""Sweeps: lists and grids become runs; what is wrong is said before the first one."""

import pkgutil

import pytest

from composer_jax.training.sweep import load_sweep

pytestmark = pytest.mark.fast

SWEEP = """
'''What is asked.'''
def get_sweep():
    return {given}
"""


def written(tmp_path, **given):
    path = tmp_path / "mine.py"
    path.write_text(SWEEP.format(given=repr({"config": "scenes64:smoke", **given})))
    return str(path)


def test_lists_grids_and_seeds_are_crossed(tmp_path):
    path = written(
        tmp_path,
        overrides=("steps=3",),
        runs={"flow": (), "v": ("process.prediction=v", "process.schedule=sd")},
        grid={"batch": (8, 16), "ema": (0.9,)},
        seeds=(0, 1),
        evaluate=("--count", 8),
    )
    sweep = load_sweep(path, ["log_every=1"])
    assert len(sweep.runs) == 2 * 2 * 2 and sweep.evaluate == ("--count", "8")
    assert sweep.name == "mine" and sweep.doc == "What is asked."
    last = sweep.runs[-1]
    assert last.label == "v batch=16 ema=0.9" and last.folder == "v_batch=16_ema=0.9-seed1"
    assert last.overrides == (
        "steps=3", "log_every=1", "process.prediction=v", "process.schedule=sd", "batch=16",
        "ema=0.9", "seed=1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gird": {}}, "did you mean 'grid'"),
        ({"runs": {"a": ("stepps=1",)}}, "did you mean 'steps'"),
        ({"config": "scenes65"}, "did you mean 'scenes64'"),
        ({"runs": {"a b": (), "a/b": ()}}, "two runs have the same name"),
        ({"grid": {"steps": (0,)}}, "steps is 0"),
        ({"grid": {"steps": 5}}, r"grid is {'steps': 5}; a dict of lists of values, as"),
        ({"grid": {"steps": ()}}, "a dict of lists of values"),
        ({"runs": ["a"]}, r"runs is \['a'\]; a dict of lists of overrides, as"),
        ({"runs": {"a": "steps=1"}}, "a dict of lists of overrides"),
        ({"overrides": "steps=1"}, "overrides is 'steps=1'; a list, as"),
        ({"seeds": 0}, "seeds is 0; a list of seeds, as"),
        ({"seeds": ()}, "a list of seeds"),
        ({"seeds": "01"}, "a list of seeds"),
        ({"evaluate": "--count 2"}, "evaluate is '--count 2'; a list of words, as"),
        ({"config": 5}, "config is 5; text that is not empty is wanted"),
    ],
)
def test_mistakes_are_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        load_sweep(written(tmp_path, **given))


def test_sweeps_are_found_by_name():
    import composer_jax.configs.ablations as package

    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    assert len(names) >= 6
    for name in names:
        sweep = load_sweep(f"ablations/{name}")
        assert len(sweep.runs) >= 4 and sweep.doc.endswith((".", ").\n", "."))
    with pytest.raises(ValueError, match="did you mean 'ablations/stems'"):
        load_sweep("ablations/stem")
    with pytest.raises(ValueError, match="no get_sweep"):
        load_sweep(__file__)
