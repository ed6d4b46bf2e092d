"""The transformer layer that CLIP's towers, DINOv2 and ViT share, under CLIP's names."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.blocks import attend, layer_norm, linear
from composer_jax.models.initializers import ones

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence over itself."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        self.heads = heads
        options = {"dtype": dtype, "rngs": rngs}
        self.q_proj, self.k_proj = linear(width, width, **options), linear(width, width, **options)
        self.v_proj = linear(width, width, **options)
        self.out_proj = linear(width, width, **options)

    def __call__(self, x: Float[Array, "b n c"], causal: bool = False) -> Float[Array, "b n c"]:
        """x [B, N, C]; `causal`: a position sees itself and those before it."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.heads, causal=causal))


class MLP(nnx.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, activation: str, *, dtype, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[activation]
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """x [B, N, C]; returns the same shape."""
        return self.fc2(self.activation(self.fc1(x)))


class TransformerLayer(nnx.Module):
    """Self-attention and an MLP, each normalised first and around a skip (arXiv 2010.11929).

    `layer_scale`: a factor by channel on either branch, as DINOv2 has it (arXiv 2304.07193).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-5,
        layer_scale: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.layer_norm1 = layer_norm(width, eps, **options)
        self.self_attn = SelfAttention(width, heads, **options)
        self.layer_norm2 = layer_norm(width, eps, **options)
        self.mlp = MLP(width, hidden, activation, **options)
        if layer_scale:
            self.layer_scale1 = nnx.Param(ones(rngs.params(), (width,)))
            self.layer_scale2 = nnx.Param(ones(rngs.params(), (width,)))

    def __call__(self, x: Float[Array, "b n c"], causal: bool = False) -> Float[Array, "b n c"]:
        """x [B, N, C]; returns the same shape."""
        x = x + self._scaled("layer_scale1", self.self_attn(self.layer_norm1(x), causal))
        return x + self._scaled("layer_scale2", self.mlp(self.layer_norm2(x)))

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        if not hasattr(self, name):
            return branch
        return branch * getattr(self, name)[...].astype(branch.dtype)[None, None]
