"""Presence: absent is not zero, absent costs nothing, growing changes nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.models.composer import Composer, ComposerConfig, grow
from composer_jax.models.initializers import described, initialised
from composer_jax.models.resizer import shrink
from composer_jax.models.unet import PRESETS

NAMES = ("caption", "palette", "semantics", "sketch", "mask")
SIZES = {"text_length": 6, "text_width": 128, "embed_width": 12}
BATCH = 2


def absent(config, seed=9):
    keys = jax.random.split(jax.random.key(seed), 2)
    parts = config.parts("caption").items()
    drawn = {n: jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, parts, strict=True)}
    return {"caption": drawn}


def values(config, seed):
    made = {}
    for i, name in enumerate(config.conditions):
        made[name] = {}
        for j, (part_name, part) in enumerate(config.parts(name).items()):
            shape = (16, 16, *part.shape) if part.kind == "spatial" else part.shape
            key = jax.random.fold_in(jax.random.key(seed), 10 * i + j)
            drawn = jax.random.uniform(key, (BATCH, *shape))
            if part.norm:
                drawn *= part.norm / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
            made[name][part_name] = drawn
    return made


@pytest.fixture(scope="module")
def model(perturbed):
    shape = {"block_out_channels": (16,), "attention": (True,), "heads": (2,)}
    unet = replace(PRESETS["tiny"], patch=1, in_channels=4 + 8, out_channels=4, **shape)
    config = ComposerConfig(
        unet, NAMES, SIZES, factor=4, local_channels=8, stem_width=8, context_length=24
    )
    return perturbed(created(config), 1)


def created(config, seed=0):
    """A composer, initialised."""
    with_absent = absent(config) if "caption" in config.conditions else None
    return initialised(described(Composer, config, with_absent), seed)


def evaluate(model, given, strength):
    graph, state = nnx.split(model)
    return compiled(graph, state, given, jnp.asarray(strength, jnp.float32))


@partial(jax.jit, static_argnums=0)
def compiled(graph, state, given, strength):
    model = nnx.merge(graph, state)
    x_t = jax.random.normal(jax.random.key(3), (BATCH, 4, 4, 4))
    strength = jnp.broadcast_to(strength[None], (BATCH, *strength.shape))
    timesteps = jnp.array([100.0, 700.0])
    return model(x_t, timesteps, model.encode(given), model.encode_absent(), strength)


@pytest.mark.parametrize("gone", range(len(NAMES)))
def test_gradient_of_an_absent_condition_is_exactly_zero(model, gone):
    given = values(model.config, 5)
    strength = [1.0] * len(NAMES)
    loss = lambda values, s: jnp.sum(evaluate(model, values, s) ** 2)  # noqa: E731
    present = jax.grad(loss)(given, strength)[NAMES[gone]]
    assert all(np.any(leaf != 0.0) for leaf in jax.tree.leaves(present))
    strength[gone] = 0.0
    nothing = jax.grad(loss)(given, strength)[NAMES[gone]]
    assert all(np.all(leaf == 0.0) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "caption"])
def test_blank_differs_from_absent(model, name):
    given = values(model.config, 6)
    given[name] = jax.tree.map(jnp.zeros_like, given[name])
    strength = [1.0] * len(NAMES)
    blank = evaluate(model, given, strength)
    strength[NAMES.index(name)] = 0.0
    assert np.max(np.abs(blank - evaluate(model, given, strength))) > 1e-3


def test_absent_caption_is_the_encoded_empty_caption(model):
    given = values(model.config, 7)
    empty = jax.tree.map(lambda a: jnp.stack([a] * BATCH), absent(model.config)["caption"])
    strength = [1.0] * len(NAMES)
    wanted = evaluate(model, {**given, "caption": empty}, strength)
    strength[0] = 0.0
    np.testing.assert_allclose(evaluate(model, given, strength), wanted, rtol=2e-4, atol=1e-4)


def test_strength_moves_from_absent_to_given(model):
    given = values(model.config, 8)
    for i, name in enumerate(NAMES):
        at = lambda s, i=i: evaluate(model, given, [s if j == i else 1.0 for j in range(5)])  # noqa: E731
        full, half, tiny, none = at(1.0), at(0.5), at(1e-6), at(0.0)
        np.testing.assert_allclose(tiny, none, atol=2e-3, err_msg=name)
        assert np.max(np.abs(half - none)) > 1e-4 and np.max(np.abs(half - full)) > 1e-4, name


@pytest.mark.mesh
@pytest.mark.optimised  # bits
def test_growing_keeps_every_older_subset_bit_for_bit(model):
    grown = grow(model, "depth", seed=4)
    grown = grow(grown, "intensity", seed=5)
    given = values(grown.config, 5)
    for subset in range(0, 32, 3):
        old = [float(subset >> i & 1) for i in range(5)]
        before = evaluate(model, {n: given[n] for n in NAMES}, old)
        np.testing.assert_array_equal(before, evaluate(grown, given, [*old, 0.0, 0.0]))
        np.testing.assert_array_equal(before, evaluate(grown, given, [*old, 1.0, 1.0]))


@pytest.mark.mesh
@pytest.mark.optimised  # bits
def test_growing_a_vector_takes_free_slots(model):
    config = replace(model.config, conditions=("caption", "sketch"), context_length=10)
    small = created(config)
    grown = grow(small, "palette", seed=1)
    given = values(grown.config, 5)
    before = evaluate(small, {n: given[n] for n in config.conditions}, [1.0, 1.0])
    np.testing.assert_array_equal(before, evaluate(grown, given, [1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="context_length is 10; 14 tokens"):
        grow(grown, "semantics", seed=1)
    with pytest.raises(ValueError, match="already has"):
        grow(grown, "palette", seed=1)


def test_without_any_caption_nothing_is_not_a_number(model, perturbed):
    config = replace(model.config, conditions=("palette", "sketch"))
    bare = perturbed(created(config), 2)
    output = evaluate(bare, values(config, 5), [0.0, 0.0])
    assert np.all(np.isfinite(output))
    other = evaluate(bare, values(config, 6), [0.0, 0.0])
    np.testing.assert_array_equal(output, other)


def test_maps_alone_need_neither_tokens_nor_vectors(model, perturbed):
    config = replace(model.config, conditions=("sketch", "mask"))
    maps = perturbed(created(config), 2)
    given, other = values(config, 5), values(config, 6)
    output = evaluate(maps, given, [1.0, 0.0])
    assert np.all(np.isfinite(output))
    np.testing.assert_array_equal(
        output, evaluate(maps, given | {"mask": other["mask"]}, [1.0, 0.0])
    )
    assert np.any(output != evaluate(maps, given | {"sketch": other["sketch"]}, [1.0, 0.0]))


@pytest.mark.parametrize("where", ["timestep", "tokens"])
def test_vectors_may_go_one_way_alone(model, perturbed, where):
    config = replace(model.config, conditions=("palette", "sketch"), vectors=where)
    one = perturbed(created(config), 2)
    given, other = values(config, 5), values(config, 6)
    assert bool(one.tokens) == (where == "tokens") and bool(one.embeddings) != bool(one.tokens)
    output = evaluate(one, given, [1.0, 1.0])
    moved = evaluate(one, given | {"palette": other["palette"]}, [1.0, 1.0])
    assert np.all(np.isfinite(output)) and np.max(np.abs(output - moved)) > 1e-4
    absent = evaluate(one, given, [0.0, 1.0])
    np.testing.assert_array_equal(
        absent, evaluate(one, given | {"palette": other["palette"]}, [0.0, 1.0])
    )


def test_resized_maps_have_no_parameters_and_see_means_of_patches(model, perturbed):
    config = replace(model.config, conditions=("sketch", "mask"), stems="resize")
    plain = perturbed(created(config), 2)
    assert not plain.stems
    given = values(config, 5)
    sketch = given["sketch"]["map"]
    patches = sketch.reshape(BATCH, 4, 4, 4, 4, 1)
    means = jnp.mean(patches, axis=(2, 4), keepdims=True)
    flat = jnp.broadcast_to(means, patches.shape).reshape(sketch.shape)
    output = evaluate(plain, given, [1.0, 1.0])
    same = evaluate(plain, given | {"sketch": {"map": flat}}, [1.0, 1.0])
    np.testing.assert_allclose(output, same, atol=1e-5)
    moved = evaluate(plain, given | {"sketch": {"map": 1.0 - sketch}}, [1.0, 1.0])
    assert np.max(np.abs(output - moved)) > 1e-4
    with pytest.raises(ValueError, match="local_channels is 2"):
        shrink(given["mask"]["map"], 4, 2)


def test_missing_value_and_missing_size_are_named(model):
    given = values(model.config, 5)
    with pytest.raises(ValueError, match="values lack sketch"):
        model.encode({n: given[n] for n in NAMES if n != "sketch"})
    config = replace(model.config, sizes={})
    with pytest.raises(ValueError, match="caption needs the size 'text_length'"):
        config.parts("caption")


def test_config_survives_json(model):
    assert ComposerConfig.from_dict(model.config.to_dict()) == model.config
    with pytest.raises(ValueError, match="no key 'colour'"):
        ComposerConfig.from_dict({**model.config.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match=r"model.stems 'resized' \(did you mean 'resize'\?\)"):
        replace(model.config, stems="resized")
