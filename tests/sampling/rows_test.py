"""Rows of a plan are what the composer makes of their values, one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.diffusion import build_plan, use
from composer_jax.models.composer import Composer, ComposerConfig
from composer_jax.models.unet import UNetConfig
from composer_jax.sampling.job import bank_of
from composer_jax.sampling.rows import arrange, evaluate_rows

NAMES = ("palette", "sketch", "semantics", "depth")
SIZE, SIDE = 16, 4
LEFT = np.repeat([[1.0, 1.0, 0.0, 0.0]], SIDE, axis=0)


@pytest.fixture(scope="module")
def composer(drawn):
    unet = UNetConfig(
        in_channels=4 + 8,
        out_channels=4,
        block_out_channels=(8, 16),
        attention=(True, True),
        heads=(2, 2),
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    config = ComposerConfig(
        unet, NAMES, {"embed_width": 6}, factor=4, local_channels=8, stem_width=8, context_length=12
    )
    return drawn(Composer, config, seed=1)


@pytest.fixture(scope="module")
def stored():
    rng = np.random.default_rng(0)

    def one():
        return {
            "palette": rng.integers(0, 9, 156).astype(np.float32),
            "sketch": (255 * (rng.random((SIZE, SIZE)) < 0.3)).astype(np.uint8),
            "semantics": rng.standard_normal(6).astype(np.float32),
            "depth": rng.integers(0, 65535, (SIZE, SIZE)).astype(np.uint16),
        }

    first, second = one(), one()
    return {name: [first[name], second[name]] for name in NAMES}


@nnx.jit
def evaluated(composer, rows, x, strength, area):
    return evaluate_rows(composer, rows, x, jnp.float32(700), strength, area)


@nnx.jit
def encoded(composer, values):
    return composer.encode({n: {p: a[:, 0] for p, a in v.items()} for n, v in values.items()})


@nnx.jit
def called(composer, x, conditions, strength):
    return composer(x, jnp.full(2, 700.0), conditions, composer.encode_absent(), strength)


def rows_of(composer, stored, uses, **options):
    """All rows' outputs [K, B, h, w, c] at one evaluation, the plan, x."""
    spatial = composer.config.having("spatial")
    plan = build_plan(uses, NAMES, np.float32([0.7]), size=(SIDE, SIDE), spatial=spatial, **options)
    values = bank_of(composer.config, SIZE, [stored, stored], plan.area.shape[3])(np.arange(2))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, SIDE, SIDE, 4)), jnp.float32)
    rows = nnx.jit(arrange)(composer, values, plan.source)
    outputs = evaluated(composer, rows, x, plan.strength[0], plan.area[0])
    return outputs, plan, x, rows


def alone(composer, x, stored, taken, local=None):
    """The composer's own output where each condition takes `taken[name]` (source, strength)."""
    sources = {name: [stored[name][max(taken.get(name, (0, 0))[0] - 1, 0)]] for name in NAMES}
    values = bank_of(composer.config, SIZE, [sources, sources], 1)(np.arange(2))
    conditions = encoded(composer, values)
    conditions.local.update(local or {})
    strength = jnp.asarray([[taken.get(name, (0, 0))[1] for name in NAMES]] * 2, jnp.float32)
    return called(composer, x, conditions, strength)


def near(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_a_row_is_the_composer_given_its_values(composer, stored):
    uses = {
        "palette": [use(0, strength=0.4), use(0, negative=True)],
        "sketch": [use(0, strength=0.6)],
        "semantics": [use(0, negative=True)],
    }
    outputs, plan, x, _ = rows_of(composer, stored, uses)
    assert plan.source.tolist() == [[1, 1, 0, 0], [2, 0, 1, 0]]
    near(outputs[0], alone(composer, x, stored, {"palette": (1, 0.4), "sketch": (1, 0.6)}))
    near(outputs[1], alone(composer, x, stored, {"palette": (2, 1.0), "semantics": (1, 1.0)}))
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2


def test_maps_share_a_picture_within_one_row(composer, stored):
    """Two sketches in regions, a depth in half the picture: masked stems, no row more."""
    uses = {
        "sketch": [use(0, region=LEFT), use(0, region=1 - LEFT, strength=0.5)],
        "depth": [use(0, region=LEFT)],
    }
    outputs, plan, x, _ = rows_of(composer, stored, uses, guidance=1.0)
    assert plan.source[0].tolist() == [0, 1, 0, 1]
    left = jnp.asarray(LEFT, jnp.float32)[None, :, :, None]
    banks = [[{name: [stored[name][j]] for name in NAMES}] * 2 for j in range(2)]
    first, second = (
        encoded(composer, bank_of(composer.config, SIZE, one, 1)(np.arange(2))).local
        for one in banks
    )
    masked = {
        "sketch": left * first["sketch"] + 0.5 * (1 - left) * second["sketch"],
        "depth": left * first["depth"],
    }
    near(outputs[0], alone(composer, x, stored, {"sketch": (1, 1), "depth": (1, 1)}, masked))


def test_one_row_of_many(composer, stored):
    uses = {"palette": [use(0, region=LEFT), use(0, region=1 - LEFT)], "sketch": [use(0)]}
    outputs, plan, x, rows = rows_of(composer, stored, uses)
    for k in range(3):
        one = evaluated(composer, rows.only(k), x, plan.strength[0, k : k + 1], plan.area[0])
        near(one[0], outputs[k])
