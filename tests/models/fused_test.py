"""The TPU's fused attention against the plain one, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composer_jax.models import fused


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize(("length", "keys"), [(256, 256), (128, 384)])
def test_output_and_gradients_are_those_of_plain_attention(
    dtype, tolerance, length, keys, monkeypatch
):
    monkeypatch.setattr(fused, "LOGITS", 128 * keys)  # several blocks of queries
    key_q, key_k, key_v, key_d = jax.random.split(jax.random.key(0), 4)
    sizes = ((key_q, length), (key_k, keys), (key_v, keys))
    q, k, v = (jax.random.normal(key, (2, size, 2, 40), dtype) for key, size in sizes)
    d_out = jax.random.normal(key_d, q.shape, dtype)

    def plain(q, k, v):
        return jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))

    out, pull = jax.vjp(lambda q, k, v: fused.attention(q, k, v, interpret=True), q, k, v)
    wanted, wanted_pull = jax.vjp(plain, q, k, v)
    pairs = zip((out, *pull(d_out)), (wanted, *wanted_pull(d_out.astype(jnp.float32))), strict=True)
    for found, right in pairs:
        found, right = (np.asarray(x, np.float32) for x in (found, right))
        assert np.linalg.norm(found - right) < tolerance * np.linalg.norm(right)


def test_only_long_whole_blocks_pay():
    assert fused.pays(4096, 4096) and fused.pays(9216, 9216) and fused.pays(1024, 1024)
    assert not fused.pays(4096, 128) and not fused.pays(256, 256) and not fused.pays(1088, 1088)


@pytest.mark.parametrize("length", [1024, 2304, 4096, 9216, 16384])
def test_blocks_divide_the_length_and_fill_whole_lanes(length):
    block = fused.block_of(length, length)
    assert length % block == 0 and block % fused.LANES == 0
