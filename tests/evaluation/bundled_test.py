"""The composer that the package brings: it opens without a name, and obeys."""

from functools import cache

import numpy as np
import pytest

from composer_jax.data.sources import open_source
from composer_jax.diffusion import Use
from composer_jax.evaluation.control import extract_all, measure_each, sample_each
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.storage.models import ASSETS

pytestmark = pytest.mark.optimised  # much is computed

COUNT, SEED = 16, 77  # scenes of a seed that nothing was chosen on


@pytest.fixture(scope="module")
def measured():
    """A function: the mean measure of a condition where `kind` is given."""
    pipe, judges = Pipeline.load(), scenes_judges()
    source = open_source(f"scenes:{COUNT}", size=pipe.size, split="test", seed=SEED)
    batch, tools = source.batch(range(COUNT)), pipe.tools(pipe.names) | judges
    stored = extract_all(batch["image"], batch["given"], pipe.names, tools)

    @cache
    def sampled(kind):
        return sample_each(pipe, stored, {name: Use(None) for name in kind}, steps=6)

    def measure(name, kind=None):
        images = sampled(pipe.names if kind is None else kind)
        wanted = [row[name] for row in stored]
        return float(np.nanmean(measure_each(name, wanted, images, tools)))

    return measure


def test_it_weighs_no_more_than_it_may():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 40e6


@pytest.mark.parametrize(
    ("name", "least"),
    [("depth", 0.8), ("intensity", 0.8), ("sketch", 0.65), ("caption", 0.5), ("semantics", 0.6)],
)
def test_a_condition_alone_is_obeyed(measured, name, least):
    assert measured(name, (name,)) > max(least, measured(name, ()) + 0.2)


def test_everything_given_comes_back(measured):
    for name, least in (("caption", 0.7), ("intensity", 0.9), ("palette", 0.6)):
        assert measured(name) > max(least, measured(name, ()) + 0.2), name
