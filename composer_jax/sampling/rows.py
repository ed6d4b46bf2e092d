"""Rows of model evaluations: a bank of values, encoded once, and what each row takes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from composer_jax.models.composer import Composer, Encoded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What K rows of B images take, encoded; all of it independent of t.

    `source` int32 [K, n], as of `diffusion.Plan`. `local`: stem outputs [B, J, h, w, C] of every
    value, by condition; `embedding` [B, K, E] by condition and `context`, arrays [B, K, L, C], are
    arranged by row. `absent`: the encoding of nothing, batch 1.
    """

    source: jax.Array
    local: dict[str, jax.Array]
    embedding: dict[str, jax.Array]
    context: list
    absent: Encoded

    def only(self, k: jax.Array) -> Rows:
        """Row k alone."""

        def pick(array):
            return jax.lax.dynamic_slice_in_dim(array, k, 1, axis=1)

        source = jax.lax.dynamic_slice_in_dim(self.source, k, 1)
        embedding, context = jax.tree.map(pick, (self.embedding, self.context))
        return replace(self, source=source, embedding=embedding, context=context)


def arrange(
    composer: Composer,
    values: Mapping[str, Mapping[str, Float[Array, "b j ..."]]],
    source: Int[Array, "k n"],
) -> Rows:
    """Encodes the bank and arranges it by row; source 0 takes any value, its strength being 0."""
    config = composer.config
    batch, bank = jax.tree.leaves(dict(values))[0].shape[:2]
    encoded = composer.encode(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), dict(values)))
    encoded = jax.tree.map(lambda a: a.reshape(batch, bank, *a.shape[1:]), encoded)
    taken_Kxn = jnp.maximum(source - 1, 0)
    column = {name: i for i, name in enumerate(config.conditions)}
    owner_L = [0] * config.context_length  # of each token: its condition; free slots take any
    for name, (start, stop) in config.layout().items():
        owner_L[start:stop] = [column[name]] * (stop - start)
    taken_KxL = taken_Kxn[:, jnp.asarray(owner_L)]

    def by_row(context_BxJxLxC):
        return context_BxJxLxC[:, taken_KxL, jnp.arange(config.context_length)[None]]

    return Rows(
        source,
        encoded.local,
        {name: each[:, taken_Kxn[:, column[name]]] for name, each in encoded.embedding.items()},
        jax.tree.map(by_row, encoded.context),
        composer.encode_absent(),
    )


def evaluate_rows(
    composer: Composer,
    rows: Rows,
    x: Float[Array, "b h w c"],
    timestep: Float[Array, ""],
    strength: Float[Array, "k n"],
    area: Float[Array, "m 2 j h w"],
) -> Float[Array, "k b h w c"]:
    """The raw outputs of all rows at x, in one batch.

    `area`: of each spatial condition, in the config's order, how strongly each value acts in each
    pixel, among the positive uses and among the negative ones.
    """
    batch, count = x.shape[0], rows.source.shape[0]

    def flat(array):
        return array.reshape(batch * count, *array.shape[2:])

    local = {}
    for name, area_2xJxhxw in zip(composer.config.having("spatial"), area, strict=True):
        column_K = rows.source[:, composer.config.conditions.index(name)]
        stem_BxJxhxwxC = rows.local[name]
        maps = jnp.einsum("bjhwc,sjhw->bshwc", stem_BxJxhxwxC, area_2xJxhxw)
        maps = maps.astype(stem_BxJxhxwxC.dtype)
        maps = jnp.concatenate([jnp.zeros_like(maps[:, :1]), maps], axis=1)
        local[name] = flat(maps[:, column_K])
    encoded = Encoded(local, jax.tree.map(flat, rows.embedding), jax.tree.map(flat, rows.context))
    outputs = composer(
        jnp.repeat(x, count, axis=0),
        jnp.full(batch * count, timestep),
        encoded,
        rows.absent,
        jnp.tile(strength, (batch, 1)),
    )
    return jnp.moveaxis(outputs.reshape(batch, count, *x.shape[1:]), 1, 0)
