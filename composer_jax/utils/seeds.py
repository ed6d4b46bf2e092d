"""Keys from seeds of up to 63 bits: jax's own take 32, unless 64-bit numbers are on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.utils.values import SEED


def seed_words(seed: int) -> np.ndarray:
    """A seed as uint32 [2], the low half first; raises ValueError where it is none."""
    SEED.check("seed", seed)
    return np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)


def key_of(seed: jax.Array) -> jax.Array:
    """The key of a seed's words uint32 [2], or of a scalar: `jax.random.key`'s below 2^32."""
    if jnp.ndim(seed) == 0:
        return jax.random.key(seed)
    low = jax.random.key_data(jax.random.key(seed[0]))  # whose first word is 0
    return jax.random.wrap_key_data(jnp.concatenate([seed[1:], low[1:]]))
