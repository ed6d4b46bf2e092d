"""One compiled program for every subset, and images that depend on seed and index alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composer_jax as cj
from composer_jax.sampling.pipeline import Pipeline

LEFT = np.repeat([[1.0] * 32 + [0.0] * 32], 64, axis=0).astype(np.float32)
RED, BLUE = ["#d62828"], ["#003049"]
BLACK = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def scene(pipe):
    """All eight conditions of two scenes: their images, and stored values."""
    batch = cj.open_source("scenes:2", size=64).batch([0, 1])
    stored = [
        cj.decompose(
            batch["image"][i],
            given={name: value[i] for name, value in batch["given"].items()},
            tools={"clip": pipe.clip},
        )
        for i in range(2)
    ]
    assert set(stored[0]) == set(pipe.names)
    return batch["image"], stored


def test_a_stored_caption_is_read_by_the_models_own_clip(pipe, scene):
    """`decompose` takes it by the bundled CLIP, whose last layer the model may not have seen."""
    stored = scene[1][0]["caption"]
    other = {**stored, "tokens": 0.5 * stored["tokens"], "vector": -stored["vector"]}
    for name in ("tokens", "vector"):
        found = pipe.stored("caption", other)[name]
        np.testing.assert_allclose(found, stored[name], atol=1e-5)
    del other["text"]
    np.testing.assert_array_equal(pipe.stored("caption", other)["vector"], -stored["vector"])


def some_region(rng):
    region = np.zeros((64, 64), np.float32)
    region[: rng.integers(16, 64), rng.integers(0, 32) :] = rng.uniform(0.5, 1.0)
    return region


def test_64_random_subsets_compile_once_for_each_bucket(pipe, scene, monkeypatch):
    """Subsets, strengths, windows, scales, regions, negatives, guidance, intervals, rescale."""
    rng, seen, program = np.random.default_rng(0), set(), pipe._program
    before = program.count()

    def watch(kind, weights, inputs):
        seen.add((inputs["plan"]["source"].shape[0], inputs["plan"]["area"].shape[3]))
        return program(kind, weights, inputs)

    monkeypatch.setattr(pipe, "_program", watch)
    done = 0
    for _ in range(64):
        uses = {}
        for name in pipe.names:
            if rng.random() < 0.5:
                begin = float(rng.uniform(0, 0.5))
                uses[name] = [
                    cj.use(
                        scene[1][i][name],
                        strength=float(rng.random()),
                        window=(begin, 1.0) if rng.random() < 0.5 else (0.0, begin + 0.1),
                        scale=float(rng.uniform(0, 5)) if rng.random() < 0.2 else None,
                        region=some_region(rng) if rng.random() < 0.3 else None,
                    )
                    for i in range(1 + (name in ("sketch", "depth") and rng.random() < 0.3))
                ]
                if rng.random() < 0.2:
                    uses[name].append(cj.use(scene[1][1][name], negative=True))
        try:
            image = pipe(
                uses,
                steps=2,
                solver="euler",  # what no other test compiles
                seed=int(rng.integers(100)),
                guidance=float(rng.uniform(0, 4)),
                interval=(0.0, float(rng.uniform(0.2, 1.0))),
                rescale=float(rng.choice([0.0, 0.7])),
            )
        except ValueError as error:
            assert "rows are needed" in str(error)  # more combinations than the largest bucket
            continue
        assert image.shape == (1, 64, 64, 3) and image.dtype == np.uint8
        done += 1
    assert done > 40 and program.count() - before == len(seen)


def test_an_image_depends_on_seed_and_index_alone(pipe):
    given = {"palette": [*RED, *BLUE]}
    ten = pipe(given, count=10, seed=3, steps=2)
    np.testing.assert_array_equal(pipe(given, count=1, seed=3, steps=2), ten[:1])
    np.testing.assert_array_equal(
        list(pipe.stream(given, count=10, first=7, seed=3, steps=2)), ten[7:]
    )
    assert len(np.unique(ten, axis=0)) == 10
    assert np.any(pipe(given, count=1, seed=4, steps=2) != ten[:1])


@pytest.mark.mesh
def test_devices_change_nothing(pipe, run, monkeypatch):
    """The same latents on eight devices and on one, noise of ddim included."""
    options = dict(count=3, steps=3, solver="ddim", eta=0.5, batch=8, output="latents")
    assert jax.local_device_count() == 8
    eight = pipe({"palette": RED}, **options)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    one = Pipeline.load(run)({"palette": RED}, **options)
    np.testing.assert_allclose(one, eight, atol=1e-5)


def test_a_guide_that_is_the_model_itself_changes_nothing(pipe, run, scene):
    given = {"sketch": scene[1][0]["sketch"], "palette": RED}
    options = dict(steps=2, guidance=2.0, output="latents")
    plain = pipe(given, **options)
    guided = Pipeline.load(run, guide=run)
    np.testing.assert_allclose(guided(given, autoguidance=2.5, **options), plain, atol=1e-4)
    np.testing.assert_allclose(guided(given, **options), plain, atol=1e-4)
    assert guided._program.count() == 1
    worse = replace(pipe.model, composer=jax.tree.map(lambda a: 0.9 * a, pipe.model.composer))
    assert (
        np.abs(Pipeline(pipe.model, worse)(given, autoguidance=2.5, **options) - plain).max() > 1e-3
    )


def test_other_weights_of_the_same_model_compile_nothing(pipe):
    """As the sample grids of training do, time after time."""
    given, options = {"palette": RED}, {"steps": 2, "output": "latents"}
    plain, compiled = pipe(given, **options), pipe._program.count()
    worse = replace(pipe.model, composer=jax.tree.map(lambda a: 0.9 * a, pipe.model.composer))
    other = pipe.with_weights(worse)
    assert np.abs(other(given, **options) - plain).max() > 1e-3
    np.testing.assert_array_equal(other.with_weights(pipe.model)(given, **options), plain)
    assert pipe._program.count() == compiled


def test_an_image_to_start_from_and_what_is_kept_of_it(pipe, scene):
    image = scene[0][0]
    latents = pipe.encode(image[None])
    kept = pipe({}, image=image, keep=np.ones((64, 64)), steps=3, output="latents")
    np.testing.assert_allclose(kept, latents, atol=1e-4)
    half = pipe({}, image=image, keep=LEFT, steps=3, output="latents")
    side = latents.shape[1] // 2
    np.testing.assert_allclose(half[:, :, :side], latents[:, :, :side], atol=1e-4)
    assert np.abs(half - latents)[:, :, side:].mean() > 0.1
    near = pipe({}, image=image, start=0.02, steps=2, output="latents")
    far = pipe({}, image=image, start=0.9, steps=2, output="latents")
    assert np.abs(near - latents).mean() < 0.1 < np.abs(far - latents).mean()


def test_noise_can_be_given(pipe):
    side, channels = 16, pipe.model.composer.config.latent_channels
    noise = np.random.default_rng(0).standard_normal((2, side, side, channels), np.float32)
    a = pipe({}, count=2, noise=noise, steps=2, seed=0)
    np.testing.assert_array_equal(a, pipe({}, count=2, noise=noise, steps=2, seed=1))
    assert np.any(a[0] != a[1])


def test_inversion_comes_back(pipe, scene):
    images, given = scene[0], {"palette": RED}
    noise = pipe.invert(images, given, steps=20)
    back = pipe(
        given, count=2, noise=noise, steps=20, guidance=1.0, solver="ddim", output="latents"
    )
    error = np.mean((back - pipe.encode(images)) ** 2)
    assert error < 1e-4 * np.var(pipe.encode(images))


@pytest.mark.optimised  # bits
def test_previews(pipe):
    seen = []
    look = lambda index, images: seen.append((index, images.shape))  # noqa: E731
    given = {"palette": RED}
    watched = pipe(given, count=9, steps=4, preview=look, every=3, batch=8)
    shapes = [(1, 64, 64, 3), (8, 64, 64, 3)]
    assert sorted(seen) == [(index, shape) for index in (0, 3) for shape in shapes]
    np.testing.assert_array_equal(watched, pipe(given, count=9, steps=4, batch=8))


def test_conflict_is_a_table_of_cosines(pipe, scene):
    stored = scene[1][0]
    names, cosines = pipe.conflict(
        {"palette": stored["palette"], "sketch": stored["sketch"]}, steps=3
    )
    assert names == [name for name in pipe.names if name in ("palette", "sketch")]
    assert cosines.shape == (3, 2, 2)
    np.testing.assert_allclose(cosines[:, [0, 1], [0, 1]], 1.0, atol=1e-5)
    np.testing.assert_allclose(cosines[:, 0, 1], cosines[:, 1, 0], atol=1e-6)
    assert (np.abs(cosines[:, 0, 1]) < 0.999).all()


def test_regions_share_a_picture(pipe):
    """Where a palette has no share, it has no say, but through the network's own reach."""
    both = {"palette": [cj.use(RED, region=LEFT), cj.use(BLUE, region=1 - LEFT)]}
    image = pipe(both, steps=2)
    assert image.shape == (1, 64, 64, 3)
    one = {"palette": [cj.use(RED, region=LEFT), cj.use(RED, region=1 - LEFT)]}
    same = pipe(one, steps=2, output="latents")
    np.testing.assert_allclose(same, pipe({"palette": RED}, steps=2, output="latents"), atol=1e-4)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"colour": "red"}, {}, "colour"),
        ({"palette": "#zzz"}, {}, "#zzz"),
        ({}, {"solver": "eulr"}, "euler"),
        ({}, {"steps": 0}, "steps"),
        ({}, {"count": 0}, "at least 1"),
        ({}, {"eta": 0.5}, "ddim"),
        ({}, {"rescale": 2}, "rescale"),
        ({}, {"guidence": 2}, "did you mean 'guidance'"),
        ({}, {"autoguidance": 2}, "second model"),
        ({}, {"start": 0.5}, "image"),
        ({}, {"start": 0.0}, "above 0"),
        ({}, {"noise": np.zeros((1, 2, 2, 4))}, "noise has shape"),
        ({}, {"noise": np.zeros((1, 64, 64, 4))}, "noise has shape"),
        ({}, {"batch": 0}, "batch"),
        ({}, {"image": BLACK}, "image does nothing: start is 1"),
        ({}, {"every": 2}, "every is for preview"),
        ({}, {"every": 0, "preview": print}, "every is 0; a whole number from 1"),
        ({}, {"every": True, "preview": print}, "every is True"),
        ({}, {"interval": (0.6, 0.9)}, "interval .* meets no evaluation"),
        ({"palette": cj.use(RED, window=(0.1, 0.2))}, {}, "palette: window .* meets no evaluation"),
        ("a red cone", {}, "given is 'a red cone'; a dict of conditions"),
        (None, {}, "given is None; a dict of conditions"),
        ({}, {"count": 2.5}, "count is 2.5; a whole number"),
        ({}, {"count": "4"}, "count is '4'; a whole number"),
        ({}, {"preview": 3}, "preview is 3; a function"),
        ({}, {"image": BLACK, "keep": np.full((64, 64), np.nan)}, "keep has values from nan"),
        ({}, {"image": BLACK, "keep": np.full((64, 64), 2.0)}, "keep has values from 2 to 2"),
        ({}, {"noise": np.full((1, 16, 16, 6), np.inf)}, "noise has values that are not finite"),
        ({}, {"image": "photo.jpg", "start": 0.5}, "images are <U9 .*fit_image"),
        ({"palette": (214, 40, 40)}, {}, "allowed: colours"),
    ],
)
def test_mistakes_are_named(pipe, given, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(given, **{"steps": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5}, "an inversion takes no start"),
        ({"eta": 0.5}, "an inversion takes no eta"),
        ({"noise": np.zeros((1, 16, 16, 6))}, "an inversion takes no noise"),
        ({"output": "images"}, "an inversion takes no output"),
    ],
)
def test_an_inversion_names_what_it_does_not_take(pipe, scene, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.invert(scene[0][0], {}, steps=2, **options)


def test_an_inversion_wants_images(pipe):
    with pytest.raises(ValueError, match=r"uint8 \[B, 64, 64, 3\] are wanted"):
        pipe.invert("photo.jpg", {})


@pytest.mark.parametrize("dtype", ["fp16", "int8", 32])
def test_a_wrong_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; 'float32' or 'bfloat16' is wanted"):
        Pipeline.load(dtype=dtype)


def test_what_does_nothing_beside_the_rest_is_said_once(pipe, caplog):
    """Whatever is checked by `check` is not computed."""
    negative = {"palette": [cj.use(RED), cj.use(BLUE, negative=True)]}
    noise = np.zeros((1, 16, 16, 6), np.float32)
    pipe._told.clear()
    for given, options, line in (
        (negative, {"guidance": 1.0}, "the negative palette does nothing: guidance is 1"),
        ({}, {"guidance": 1.0, "rescale": 0.7}, "rescale does nothing: guidance is 1"),
        ({}, {"guidance": 0.5, "interval": (0, 0.7)}, "interval does nothing: no guidance is"),
        ({}, {"noise": noise, "seed": 3}, "seed does nothing: the noise is given"),
    ):
        for fresh in (True, False):
            caplog.clear()
            pipe.check(pipe.uses(given), steps=2, **options)
            assert [line in record.message for record in caplog.records] == [True] * fresh
    for given, options in (
        (negative, {}),
        ({"palette": cj.use(RED, scale=2.0)}, {"guidance": 1.0, "rescale": 0.5}),
        ({"palette": cj.use(RED, scale=2.0)}, {"guidance": 1.0, "interval": (0.0, 0.9)}),
        ({}, {"guidance": 1.0, "rescale": 0.0, "interval": (0.0, 1.0)}),
        ({}, {"noise": noise, "seed": 3, "eta": 0.5, "solver": "ddim"}),
    ):
        pipe._told.clear()
        caplog.clear()
        pipe.check(pipe.uses(given), steps=2, **options)
        assert not caplog.records, given


def test_half_precision(pipe, run):
    """Weights are held in it, noise and latents are not; the images are almost the same."""
    half = Pipeline.load(run, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half._weights)} == {jnp.dtype(jnp.bfloat16)}
    options = dict(steps=3, output="latents")
    latents = half({"palette": RED}, **options)
    wanted = pipe({"palette": RED}, **options)
    assert latents.dtype == np.float32
    assert 0 < np.linalg.norm(latents - wanted) < 0.03 * np.linalg.norm(wanted)
