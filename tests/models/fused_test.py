"""The TPU's fused attention against the plain one, in Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composer_jax.models import blocks, fused
from composer_jax.models.blocks import MASKED, Attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize(("length", "keys"), [(256, 256), (128, 384)])
@pytest.mark.parametrize("biased", [False, True])
def test_output_and_gradients_are_those_of_plain_attention(
    dtype, tolerance, length, keys, biased, monkeypatch
):
    monkeypatch.setattr(fused, "LOGITS", 128 * keys)  # several blocks of queries
    key_q, key_k, key_v, key_d, key_b = jax.random.split(jax.random.key(0), 5)
    sizes = ((key_q, length), (key_k, keys), (key_v, keys))
    q, k, v = (jax.random.normal(key, (2, size, 2, 40), dtype) for key, size in sizes)
    d_out = jax.random.normal(key_d, q.shape, dtype)
    bias = [jax.random.normal(key_b, (2, keys))] if biased else []

    def plain(q, k, v, *bias):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        bias = bias[0][:, None, None, :] if bias else None
        return jax.nn.dot_product_attention(q, k, v, bias)

    inputs = (q, k, v, *bias)
    out, pull = jax.vjp(lambda *inputs: fused.attention(*inputs, interpret=True), *inputs)
    wanted, wanted_pull = jax.vjp(plain, *inputs)
    pairs = zip((out, *pull(d_out)), (wanted, *wanted_pull(d_out.astype(jnp.float32))), strict=True)
    for found, right in pairs:
        found, right = (np.asarray(x, np.float32) for x in (found, right))
        assert np.linalg.norm(found - right) < tolerance * np.linalg.norm(right)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_a_packed_projection_gives_what_its_parts_give(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS", 128 * 256)  # two blocks of queries
    qkv = jax.random.normal(jax.random.key(0), (2, 256, 2, 3, 40), dtype)
    d_out = jax.random.normal(jax.random.key(1), (2, 256, 2, 40), dtype)

    def plain(qkv):
        q, k, v = (qkv[:, :, :, i].astype(jnp.float32) for i in range(3))
        return jax.nn.dot_product_attention(q, k, v)

    out, pull = jax.vjp(lambda qkv: fused.packed_attention(qkv, interpret=True), qkv)
    wanted, wanted_pull = jax.vjp(plain, qkv)
    (gradient,), (right,) = pull(d_out), wanted_pull(d_out.astype(jnp.float32))
    for found, exact in (
        (out, wanted),
        *((gradient[..., i, :], right[..., i, :]) for i in (0, 1, 2)),
    ):
        found, exact = (np.asarray(x, np.float32) for x in (found, exact))
        assert np.linalg.norm(found - exact) < tolerance * np.linalg.norm(exact)


def test_one_product_on_tpus_is_the_three_of_a_layer_over_itself(monkeypatch):
    layer = Attention(32, 32, 2, bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 256, 32), jnp.bfloat16)
    monkeypatch.setattr(blocks, "split", lambda kernel, *_: kernel)
    wanted = layer(x)
    monkeypatch.setattr(fused, "packed_attention", partial(fused.packed_attention, interpret=True))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *inputs, tpu, **_: tpu(*inputs))
    found, wanted = (np.asarray(y, np.float32) for y in (layer(x), wanted))
    assert np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_keys_that_must_not_be_seen_have_no_weight():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 256, 1, 8)) for i in range(3))
    bias = jnp.where(jnp.arange(256) < 100, 0.0, MASKED)[None]
    seen = jax.nn.dot_product_attention(q, k[:, :100], v[:, :100])
    found = fused.attention(q, k, v, bias, interpret=True)
    np.testing.assert_allclose(found, seen, atol=1e-5)


def test_only_whole_blocks_that_fit_pay():
    assert fused.pays(4096, 4096) and fused.pays(9216, 9216) and fused.pays(256, 128)
    assert not fused.pays(64, 64) and not fused.pays(1088, 1088) and not fused.pays(4096, 77)
    assert not fused.pays(32768, 32768)


@pytest.mark.parametrize("length", [1024, 2304, 4096, 9216, 16384])
def test_blocks_divide_the_length_and_fill_whole_lanes(length):
    block = fused.block_of(length, length)
    assert length % block == 0 and block % fused.LANES == 0
