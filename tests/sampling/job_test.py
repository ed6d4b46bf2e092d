"""What the sampler's program is given: microbatches, latents, the bank; no network runs."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.diffusion import Process, use
from composer_jax.models.composer import ComposerConfig
from composer_jax.models.unet import PRESETS
from composer_jax.sampling.job import Frame, default_batch, make_job
from composer_jax.sampling.options import Options

pytestmark = pytest.mark.fast

SIZE, SIDE, CHANNELS, COUNT = 16, 4, 6, 5
NAMES = ("palette", "sketch")
CONFIG = ComposerConfig(PRESETS["tiny"], NAMES, latent_channels=CHANNELS, factor=4)
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((COUNT, SIDE, SIDE, CHANNELS)).astype(np.float32)
PALETTES = [RNG.random(156).astype(np.float32) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def vectors():
    return np.stack([conditions.get("palette").value(one)["vector"] for one in PALETTES])


def job(options=None, guided=False, uses=None, stored=None, **rest):
    frame = Frame(CONFIG, Process(), SIZE, SIDE, guided)
    uses = {"palette": [use(None)]} if uses is None else uses
    stored = [{"palette": [one]} for one in PALETTES] if stored is None else stored
    seeds = [(7, index) for index in range(len(stored))]
    return make_job(frame, options or Options(steps=2), uses, stored, seeds, **rest)


def kept(made, first=0):
    """The inputs that images have of their own, of the rows that are wanted, and batch sizes."""
    parts = [(dict(inputs), wanted) for inputs, wanted in made.inputs(first)]
    own = {
        name: np.concatenate([np.asarray(inputs[name])[wanted] for inputs, wanted in parts])
        for name in ("seeds", "noise", "known", "keep")
    }
    own["palette"] = np.concatenate(
        [np.asarray(inputs["values"]["palette"]["vector"])[wanted] for inputs, wanted in parts]
    )
    return own, [len(inputs["seeds"]) for inputs, _ in parts]


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_each_image_has_its_place_in_padded_microbatches(vectors, batch, first):
    made = job(Options(steps=2, batch=batch), noise=NOISE)
    own, sizes = kept(made, first)
    assert set(sizes) == {batch} and len(sizes) == -(-COUNT // batch) - first // batch
    np.testing.assert_array_equal(own["seeds"], [(7, 0, index) for index in range(first, COUNT)])
    np.testing.assert_array_equal(own["noise"], NOISE[first:])
    np.testing.assert_array_equal(own["palette"][:, 0], vectors[first:])


def test_nothing_is_run_where_no_image_lacks():
    assert not list(job(Options(steps=2, batch=4), noise=NOISE).inputs(COUNT))


@pytest.mark.mesh
def test_devices_share_a_microbatch():
    made = job(Options(steps=2, batch=3), noise=NOISE)
    ((inputs, wanted),) = made.inputs()
    assert inputs["noise"].shape[0] == 8 == jax.local_device_count() and wanted == slice(0, COUNT)
    assert [shard.data.shape[0] for shard in inputs["noise"].addressable_shards] == [1] * 8
    assert inputs["times"].sharding.is_fully_replicated
    assert len(inputs["times"].sharding.device_set) == 8


def test_a_microbatch_is_larger_where_latents_are_small():
    assert [default_batch(side) for side in (8, 16, 22, 23, 32, 64)] == [4, 4, 2, 1, 1, 1]
    assert job().batch == 4 and job(Options(batch=3)).batch == 3


def test_latents_are_given_or_nothing():
    shared = next(job().inputs())[0]
    assert not shared["own_noise"] and not shared["from_known"] and job().output == "images"
    own, _ = kept(job())
    for name in ("noise", "known", "keep"):
        shape = (COUNT, SIDE, SIDE, 1 if name == "keep" else CHANNELS)
        np.testing.assert_array_equal(own[name], np.zeros(shape, np.float32))
    keep = np.zeros((SIZE, SIZE))
    keep[:, : SIZE // 2 + 2] = 1.0
    made = job(Options(steps=2, start=0.5), noise=NOISE, known=NOISE[:1], keep=keep)
    shared = next(made.inputs())[0]
    assert shared["own_noise"] and shared["from_known"] and shared["times"][0] == 0.5
    own, _ = kept(made)
    np.testing.assert_array_equal(own["known"], NOISE[:1].repeat(COUNT, axis=0))
    np.testing.assert_allclose(own["keep"][..., 0], np.tile([1.0, 1.0, 0.5, 0.0], (COUNT, SIDE, 1)))
    np.testing.assert_array_equal(kept(job(known=NOISE))[0]["known"], NOISE)
    as_image = kept(job(known=NOISE[:1], keep=(255 * keep).astype(np.uint8)))[0]
    np.testing.assert_array_equal(as_image["keep"], own["keep"])


def test_windows_and_intervals_are_shares_of_what_is_run():
    """From an image, half-way, the first half of the evaluations is that of the 4 that are made."""
    uses = {"palette": [use(None, window=(0.0, 0.5))]}
    options = Options(steps=4, start=0.5, guidance=3.0, interval=(0.0, 0.25))
    plans = {}
    for name, some in (("whole", replace(options, start=1.0)), ("half", options)):
        made = job(some, uses=uses, known=NOISE[:1])
        plans[name] = jax.tree.map(np.asarray, next(made.inputs())[0]["plan"])
    jax.tree.map(np.testing.assert_array_equal, plans["whole"], plans["half"])
    np.testing.assert_array_equal(plans["half"]["strength"][:, 0, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(plans["half"]["weight"][:, 0, 0, 0], [3, 1, 1, 1])
    late = {"palette": [use(None, window=(0.8, 1.0))]}
    with pytest.raises(ValueError, match=r"palette: window \(0.8, 1\) meets no evaluation"):
        job(options, uses=late, known=NOISE[:1])
    inverted = replace(options, solver="ddim")
    job(inverted, uses=late, known=NOISE[:1], way="plain")  # which evaluates at the end


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": NOISE[:1]}, r"noise has shape \[1, 4, 4, 6\]; \[5, 4, 4, 6\] is wanted"),
        ({"noise": np.zeros((COUNT, 8, 8, CHANNELS))}, "noise has shape"),
        ({"known": NOISE[:2]}, "2 images are given for 5 samples"),
        ({"known": NOISE, "keep": np.ones((SIDE, SIDE))}, r"keep has shape .*\[16, 16\] is wanted"),
        ({"keep": np.ones((SIZE, SIZE))}, "need an image"),
        ({"way": "fixed-point"}, "need an image"),
        ({"options": Options(start=0.5)}, "need an image"),
        (
            {"options": Options(start=1e-4, spacing="trailing"), "known": NOISE},
            "start is 0.0001, which trailing spacing rounds to 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        job(**given)


def test_what_compiles_a_program_of_its_own():
    kind = job().kind
    assert (kind.noisy, kind.guide, kind.inversion, kind.probe, kind.preview) == (
        False, 0, "", False, False,
    )  # fmt: skip
    assert job(Options(solver="ddim", eta=0.5)).kind.noisy
    assert job(preview=print).kind.preview and job(probe=["palette"]).kind.probe
    # a second network has at least one row, so that autoguidance on or off compiles nothing
    assert job(guided=True).kind == job(Options(steps=2, autoguidance=2.0), guided=True).kind
    assert job(guided=True).kind.guide == 1


def test_a_bank_holds_each_images_values_and_blanks(vectors):
    sketch = np.full((SIZE, SIZE), 255, np.uint8)
    uses = {"palette": [use(None), use(None)], "sketch": [use(None)]}
    stored = [{"palette": PALETTES[:2], "sketch": [sketch]}, {"palette": PALETTES[2:3]}]
    inputs, wanted = next(job(uses=uses, stored=stored).inputs())
    assert wanted == slice(0, 2)
    values = jax.tree.map(lambda leaf: np.asarray(leaf)[wanted], inputs["values"])
    palette, maps = values["palette"]["vector"], values["sketch"]["map"]
    assert palette.shape == (2, 2, 156) and maps.shape == (2, 2, SIZE, SIZE, 1)
    np.testing.assert_array_equal(palette[0], vectors[:2])
    np.testing.assert_array_equal(palette[1], [vectors[2], np.zeros(156)])
    assert (maps[0, 0] == 1.0).all() and not maps[0, 1].any() and not maps[1].any()
