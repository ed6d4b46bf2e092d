"""How conditions work together, measured on samples whose obedience is known."""

import numpy as np
import pytest

from composer_jax.data.sources import open_source
from composer_jax.evaluation.composition import compose, measurements
from composer_jax.evaluation.control import extract_all
from composer_jax.evaluation.experiments import EXPERIMENTS, cells, other

COUNT, NAMES = 16, ("intensity", "palette", "sketch")


@pytest.fixture(scope="module")
def scenes():
    images = open_source(f"scenes:{COUNT}", size=64, split="test").batch(range(COUNT))["image"]
    return images, extract_all(images, {}, NAMES, {})


def test_perfect_and_ignored_conditions(scenes):
    """A sampler that gives back the example's own image obeys all that is the example's and
    nothing that is another's; given nothing it gives another image."""
    images, stored = scenes
    away = np.roll(images, 5, axis=0)

    def get(cell):
        if not cell.uses:
            return [away]
        (use,) = {use.strength for use in cell.uses.values()}
        shares = np.arange(COUNT) < round(use * COUNT)  # the stronger, the more of them obey
        return [np.where(shares[:, None, None, None], images, away)]

    measured = []
    found = compose(NAMES, stored, images, get, EXPERIMENTS, {}, measured.append)
    assert sum(measured) == measurements(NAMES, EXPERIMENTS)
    pairs = {(a, b) for a in NAMES for b in NAMES if a != b}
    assert set(found.retention) == set(found.conflict) == set(found.leakage) == pairs
    assert all(value == pytest.approx(1.0) for value in found.retention.values())
    for a in NAMES:
        for b in NAMES:
            if a < b:  # b is the swapped one of the pair
                assert found.conflict[a, b] == pytest.approx(1.0)
                assert found.leakage[a, b] == pytest.approx(0.0)
                assert abs(found.conflict[b, a]) < 0.3
                assert found.leakage[b, a] == pytest.approx(1.0 - found.conflict[b, a])
        assert found.monotone[a] == pytest.approx(1.0)
        assert found.strength[a] == sorted(found.strength[a])
        assert set(found.windows[a]) == {"early", "late"}
    assert " | ".join(("palette", "sketch")) in found.to_dict()["retention"]


def test_what_controls_nothing_has_no_retention(scenes):
    images, stored = scenes
    found = compose(NAMES, stored, images, lambda cell: [images[::-1]], ("pairs",), {})
    assert not found.retention and not found.conflict


def test_cells_are_what_is_asked_for():
    assert len(cells(NAMES, ())) == 2 + len(NAMES)
    names = [cell.name for cell in cells(NAMES, EXPERIMENTS)]
    assert len(set(names)) == len(names) == 5 + 3 + 3 + 9 + 6
    assert "pair intensity+palette" in [cell.name for cell in cells(NAMES, ("conflict",))]


@pytest.mark.parametrize("count", [2, 5, 6])
def test_the_other_example_is_another(count):
    others = [other(i, count) for i in range(count)]
    assert all(0 <= j < count and j != i for i, j in enumerate(others))
