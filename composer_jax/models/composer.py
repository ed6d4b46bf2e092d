"""The composer: conditions of every kind around a cross-attention UNet (arXiv 2302.09778).

`encode` computes what does not depend on the timestep, once per sample; `__call__` is one
evaluation. How strongly each condition acts is an argument of the evaluation, `strength` [B, n]:
0 is absent, 1 is given. A spatial condition's stem output and a vector's timestep embedding are
multiplied by it, a vector's tokens get log(strength) in the attention logits, and a condition whose
absence has an encoding (the empty caption) moves linearly from that encoding to its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from composer_jax import conditions
from composer_jax.conditions import Part
from composer_jax.conditions.base import meant
from composer_jax.models.blocks import MASKED, START
from composer_jax.models.initializers import described, initialised, start_at_zero
from composer_jax.models.resizer import Stem, VectorProjection, shrink
from composer_jax.models.unet import UNet, UNetConfig

STEMS = ("convolutions", "resize")
VECTORS = ("both", "timestep", "tokens")

Values = Mapping[str, Mapping[str, jax.Array]]


@dataclass(frozen=True)
class ComposerConfig:
    """What a composer is made of; JSON both ways.

    `conditions`: ordered names. `sizes`: what CLIP decides (text_length, text_width, embed_width).
    `latent_channels`, `factor`: the codec's. `stems`: how a map gets to latent size, by
    "convolutions", or "resize" without parameters. `vectors`: where vectors go, into the "timestep"
    embedding, the context as "tokens", or "both". `context_length`: tokens of the padded context,
    with free slots for conditions added later.
    """

    unet: UNetConfig
    conditions: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    latent_channels: int = 4
    factor: int = 8
    local_channels: int = 16
    stems: str = "convolutions"
    stem_width: int = 64
    vectors: str = "both"
    tokens_per_vector: int = 4
    context_length: int = 128

    def __post_init__(self):
        for name, known in (("stems", STEMS), ("vectors", VECTORS)):
            word = getattr(self, name)
            if word not in known:
                hint = meant(word, known)
                raise ValueError(f"model.{name} {word!r}{hint}; allowed: {', '.join(known)}")

    @property
    def multiple(self) -> int:
        """What an image's sides are multiples of, in pixels."""
        return self.factor * self.unet.patch * 2 ** (len(self.unet.block_out_channels) - 1)

    def to_dict(self) -> dict:
        """As JSON's types."""
        return asdict(self) | {"unet": self.unet.to_dict(), "conditions": list(self.conditions)}

    @classmethod
    def from_dict(cls, values: Mapping) -> ComposerConfig:
        """From `to_dict`'s result; raises ValueError for an unknown key."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"composer config has no key {key!r}; it has {', '.join(known)}")
        unet, names = UNetConfig.from_dict(values["unet"]), tuple(values["conditions"])
        return cls(**dict(values) | {"unet": unet, "conditions": names})

    def parts(self, name: str) -> dict[str, Part]:
        """The parts of a condition, every size a number; raises ValueError for a missing one."""
        resolved = {}
        for part_name, part in conditions.get(name).parts.items():
            for size in part.shape:
                if isinstance(size, str) and size not in self.sizes:
                    raise ValueError(f"condition {name} needs the size {size!r}, which CLIP gives")
            shape = tuple(self.sizes[s] if isinstance(s, str) else s for s in part.shape)
            resolved[part_name] = replace(part, shape=shape)
        return resolved

    def having(self, kind: str) -> tuple[str, ...]:
        """The conditions with a part of that kind ("spatial", "vector", "tokens"), in order."""

        def has(name: str) -> bool:
            return any(part.kind == kind for part in self.parts(name).values())

        return tuple(name for name in self.conditions if has(name))

    def token_parts(self, name: str) -> dict[str, Part]:
        """The parts of a condition that become context tokens.

        A vector does (`tokens_per_vector` of them), unless its condition brings tokens itself or
        vectors go into the timestep embedding alone.
        """
        parts = self.parts(name)
        tokens = {key: part for key, part in parts.items() if part.kind == "tokens"}
        vectors = {key: part for key, part in parts.items() if part.kind == "vector"}
        return tokens or (vectors if self.vectors != "timestep" else {})

    @property
    def embedded(self) -> tuple[str, ...]:
        """The conditions whose vectors join the timestep embedding, in order."""
        return self.having("vector") if self.vectors != "tokens" else ()

    def layout(self) -> dict[str, tuple[int, int]]:
        """Slots (start, stop) of each condition's tokens in the context, in order.

        Raises ValueError where the tokens do not fit into `context_length`.
        """
        start, slots = 0, {}
        for name in self.conditions:
            lengths = [
                part.shape[0] if part.kind == "tokens" else self.tokens_per_vector
                for part in self.token_parts(name).values()
            ]
            slots[name] = (start, start + sum(lengths))
            start += sum(lengths)
        if start > self.context_length:
            raise ValueError(f"context_length is {self.context_length}; {start} tokens are needed")
        return slots


class Constant(nnx.Variable):
    """An array that belongs to a model and is never trained."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """Conditions as the UNet takes them, each fully given; every array has a leading batch axis.

    `local`: stem outputs [B, h, w, C] by condition. `embedding`: timestep embeddings [B, E] by
    condition. `context`: keys and values of all tokens for each cross-attention.
    """

    local: dict[str, jax.Array]
    embedding: dict[str, jax.Array]
    context: list


class Composer(nnx.Module):
    """UNet, stems and projections. `absent`: values of the conditions whose absence is encoded.

    `remat`: what a gradient computes again, as `UNet` takes it.
    """

    def __init__(
        self,
        config: ComposerConfig,
        absent: Values | None = None,
        *,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        config.layout()
        self.config, self.dtype = config, dtype
        width, time_width = config.unet.cross_attention_dim, config.unet.time_embed_dim
        options = {"dtype": dtype, "rngs": rngs}
        stems, embeddings, tokens = {}, {}, {}
        for name in config.conditions:
            for part_name, part in config.parts(name).items():
                key, size = f"{name}_{part_name}", part.shape[-1]
                if part.kind == "spatial" and config.stems == "convolutions":
                    stems[key] = Stem(
                        size, config.local_channels, config.stem_width, config.factor, **options
                    )
                if part.kind == "vector" and name in config.embedded:
                    embeddings[key] = VectorProjection(
                        size, part.norm, time_width, time_width, **options
                    )
            for part_name, part in config.token_parts(name).items():
                key, size = f"{name}_{part_name}", part.shape[-1]
                if part.kind == "vector":
                    out = config.tokens_per_vector * width
                    tokens[key] = VectorProjection(size, part.norm, width, out, **options)
                elif size != width:
                    tokens[key] = nnx.Linear(size, width, **START, **options)
        self.stems, self.embeddings = nnx.Dict(stems), nnx.Dict(embeddings)
        self.tokens = nnx.Dict(tokens)
        self.absent = nnx.Dict(
            {
                name: nnx.Dict(
                    {part: Constant(jnp.asarray(array)) for part, array in value.items()}
                )
                for name, value in (absent or {}).items()
            }
        )
        self.unet = UNet(config.unet, remat=remat, dtype=dtype, rngs=rngs)

    def encode(self, values: Values) -> Encoded:
        """Everything that does not depend on t. `values[condition][part]`: float32 [B, ...].

        Raises ValueError where a condition lacks a value (an absent one takes blanks).
        """
        missing = [name for name in self.config.conditions if name not in values]
        if missing:
            raise ValueError(f"values lack {', '.join(missing)}; give blanks with strength 0")
        local = {}
        for name in self.config.conditions:
            for part_name, part in self.config.parts(name).items():
                if part.kind == "spatial":
                    maps = values[name][part_name].astype(self.dtype)
                    local[name] = self._local(f"{name}_{part_name}", maps) + local.get(name, 0.0)
        embedding = {name: self._embed(name, values[name]) for name in self.config.embedded}
        batch = jax.tree.leaves(dict(values))[0].shape[0]
        return Encoded(local, embedding, self.unet.project_context(self._context(values, batch)))

    def encode_absent(self) -> Encoded:
        """The encoding of nothing, batch 1: where a condition with an encoded absence starts."""
        values = {
            name: {key: array[...][None] for key, array in self.absent[name].items()}
            if name in self.absent
            else {key: jnp.zeros((1, *p.shape)) for key, p in self.config.token_parts(name).items()}
            for name in self.config.conditions
        }
        encoded = [name for name in self.config.embedded if name in self.absent]
        embedding = {name: self._embed(name, values[name]) for name in encoded}
        return Encoded({}, embedding, self.unet.project_context(self._context(values, 1)))

    def _local(self, key: str, maps: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        if key in self.stems:
            return self.stems[key](maps)
        return shrink(maps, self.config.factor, self.config.local_channels)

    def _embed(self, name: str, value: Mapping[str, jax.Array]) -> Float[Array, "b e"]:
        vectors = [k for k, part in self.config.parts(name).items() if part.kind == "vector"]
        return sum(self.embeddings[f"{name}_{k}"](value[k].astype(self.dtype)) for k in vectors)

    def _context(self, values: Values, batch: int) -> Float[Array, "b l d"]:
        """All tokens at their slots, padded with zeros to `context_length`."""
        width, pieces = self.config.unet.cross_attention_dim, []
        for name in self.config.conditions:
            for part_name in self.config.token_parts(name):
                key, tokens = f"{name}_{part_name}", values[name][part_name].astype(self.dtype)
                tokens = self.tokens[key](tokens) if key in self.tokens else tokens
                pieces.append(tokens.reshape(batch, -1, width))
        used = sum(piece.shape[1] for piece in pieces)
        free = jnp.zeros((batch, self.config.context_length - used, width), self.dtype)
        return jnp.concatenate([*pieces, free], axis=1)

    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        encoded: Encoded,
        absent: Encoded,
        strength: Float[Array, "b n"],
    ) -> Float[Array, "b h w c"]:
        """One evaluation: the raw network output, float32, of the shape of `x_t`.

        `encoded`: of `encode`; `absent`: of `encode_absent`; `strength` in [0, 1], a column for
        each of the config's conditions in order.
        """
        config = self.config
        column = {name: strength[:, i] for i, name in enumerate(config.conditions)}
        local_BxhxwxC = jnp.zeros((*x_t.shape[:3], config.local_channels), self.dtype)
        for name, stem_BxhxwxC in encoded.local.items():
            local_BxhxwxC += column[name][:, None, None, None].astype(self.dtype) * stem_BxhxwxC
        embedding_BxE = jnp.zeros((x_t.shape[0], config.unet.time_embed_dim), self.dtype)
        for name, vector_BxE in encoded.embedding.items():
            s_Bx1 = column[name][:, None].astype(self.dtype)
            embedding_BxE += s_Bx1 * vector_BxE
            if name in absent.embedding:
                embedding_BxE += (1.0 - s_Bx1) * absent.embedding[name]
        mix_BxL, bias_BxL = self._token_strength(column)

        def blend(given, nothing):
            mix = mix_BxL.astype(self.dtype)
            mix = mix.reshape(mix.shape + (1,) * (given.ndim - 2))
            return mix * given + (1.0 - mix) * nothing

        context = jax.tree.map(blend, encoded.context, absent.context)
        inputs = jnp.concatenate([x_t.astype(self.dtype), local_BxhxwxC], axis=-1)
        return self.unet(inputs, timesteps, context, bias_BxL, embedding_BxE).astype(jnp.float32)

    def _token_strength(self, column: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Per token: how far from the absent encoding [B, L], and what its logits get [B, L].

        Without a token that is always seen, the first free slot (a zero token) is.
        """
        slots = self.config.layout()
        batch = next(iter(column.values())).shape[0]
        mix, bias = [], []
        for name, (start, stop) in slots.items():
            s_Bx1 = column[name][:, None]
            encoded = name in self.absent
            present = s_Bx1 > 0
            log_s = jnp.where(present, jnp.log(jnp.maximum(s_Bx1, 1e-12)), MASKED)
            shape = (batch, stop - start)
            mix.append(jnp.broadcast_to(s_Bx1 if encoded else present.astype(jnp.float32), shape))
            bias.append(jnp.zeros(shape) if encoded else jnp.broadcast_to(log_s, shape))
        used = max((stop for _, stop in slots.values()), default=0)
        free = np.full((1, self.config.context_length - used), MASKED, np.float32)
        if not len(self.absent) and free.size:
            free[0, 0] = 0.0
        shape = (batch, free.shape[1])
        mix.append(jnp.ones(shape))
        bias.append(jnp.broadcast_to(jnp.asarray(free), shape))
        return jnp.concatenate(mix, axis=1), jnp.concatenate(bias, axis=1)


def grow(model: Composer, name: str, absent: Values | None = None, *, seed: int) -> Composer:
    """A composer with one condition more; every older subset gives the same output as before.

    The new stem, timestep embedding and tokens start with zero output; tokens take free slots of
    the padded context. `absent`: the new condition's, where its absence is encoded; `seed`: of its
    layers. Raises ValueError where the condition is already there or its tokens do not fit.
    """
    if name in model.config.conditions:
        raise ValueError(f"the model already has the condition {name}")
    config = replace(model.config, conditions=(*model.config.conditions, name))
    old = {key: {part: v[...] for part, v in parts.items()} for key, parts in model.absent.items()}
    new = described(Composer, config, {**old, **(absent or {})}, dtype=model.dtype)
    silence(new, name)
    for part_name in config.parts(name):
        if f"{name}_{part_name}" in new.stems:
            start_at_zero(new.stems[f"{name}_{part_name}"].conv_out.kernel)
    new = initialised(new, seed)
    nnx.update(new, nnx.state(model))
    return new


def silence(model: Composer, name: str) -> None:
    """Sets the last layers of a condition's projections, into embedding and tokens, to zero."""
    for projections in (model.embeddings, model.tokens):
        for part_name in model.config.parts(name):
            if f"{name}_{part_name}" in projections:
                projection = projections[f"{name}_{part_name}"]
                start_at_zero(getattr(projection, "linear_2", projection).kernel)
