"""The step's program is kept: the same bits, nothing traced, nothing stale."""

from functools import partial

import jax
import numpy as np
import pytest

from composer_jax.storage import programs
from composer_jax.training import kept
from composer_jax.training.kept import compile_step
from composer_jax.training.sharding import make_mesh, shard_tree, to_devices
from composer_jax.training.state import abstract_state, start_state
from composer_jax.training.step import jit_step
from tests.training import toy

pytestmark = [pytest.mark.mesh, pytest.mark.optimised]  # bits

STEPS = 4


@pytest.fixture
def keep(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    monkeypatch.setattr(kept, "kept_programs", lambda: folder)
    return folder


def train(about, sizes=(2, 4, 1), examples=16):
    """The state after a few steps, and how often the loss was traced for it."""
    traced, optimizer, mesh = [], toy.optimizer(), make_mesh(*sizes)

    def loss(*args):
        traced.append(args)
        return toy.loss(*args)

    of = toy.init(), optimizer, (0.1,)
    shardings = shard_tree(abstract_state(*of), mesh, (("kernel", "fsdp"),))
    state = start_state(*of, shardings)
    batch = lambda step: to_devices(jax.tree.map(lambda a: a[:examples], toy.batch(step)), mesh)  # noqa: E731
    compile_for = partial(compile_step, jit_step(shardings, loss, optimizer, 0.9, 1, "float32"))
    with jax.set_mesh(mesh):
        step, compiled = compile_for(state, batch(0), np.uint32(0), {}, about)
    assert compiled.cost_analysis()["flops"] > 0
    for at in range(STEPS):
        before = state
        state, metrics = step(state, batch(at), np.uint32(0))
        assert before.params["layer"]["kernel"].is_deleted()  # its memory is used again
    assert float(metrics["loss"]) > 0
    return state, len(traced)


def test_what_was_kept_gives_the_same_bits_and_is_not_traced(keep):
    plain, traced = train(None)
    assert traced and not keep.exists()
    first, traced = train({"config": 1})
    assert traced and len(list(keep.iterdir())) == 1
    again, traced = train({"config": 1})
    assert not traced
    toy.same(first, again)
    toy.same(first, plain)
    assert jax.tree.map(lambda leaf: leaf.sharding, again) == jax.tree.map(
        lambda leaf: leaf.sharding, plain
    )


def test_what_depends_on_anything_else_is_traced_anew(keep, monkeypatch):
    train({"config": 1})
    for change in ({"about": {"config": 2}}, {"sizes": (8, 1, 1)}, {"examples": 8}):
        _, traced = train(**{"about": {"config": 1}} | change)
        assert traced, change
    monkeypatch.setattr(programs, "fingerprint", lambda rooms: "other code")
    _, traced = train({"config": 1})
    assert traced and len(list(keep.iterdir())) == 5


def test_nothing_is_kept_where_there_is_no_cache(monkeypatch):
    monkeypatch.setattr(kept, "kept_programs", lambda: None)
    _, traced = train({"config": 1})
    assert traced
