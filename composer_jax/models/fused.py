"""Softmax attention as one Pallas kernel a direction, for TPUs (arXiv 2205.14135, 2307.08691).

XLA writes the logits of long sequences to memory, several times for a gradient: 64 x 64 positions
of 8 heads are 1 GiB for 4 images. Here a head's keys and values stay in the chip's vector memory,
and logits exist for one block of queries at a time. A gradient computes them again from the stored
logarithm of their sums: five products, where the forward pass has two.

Positions lie along the chip's lanes: heads of 40 features need no padding in memory, XLA hands them
over as its projections write them, and the softmax's sums run over whole registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

LANES = 128  # a head's width is rounded up to this inside the matrix unit
LOGITS = 2**20  # of one block, held in the vector memory
VMEM = 64 * 2**20


def pays(length: int, keys: int) -> bool:
    """Whether the kernels are quicker than XLA: whole blocks, keys that fit, not too little."""
    return length % LANES == 0 and keys % LANES == 0 and length >= 256 and keys <= 16384


def attention(q, k, v, bias=None, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v for q [B, N, H, D], k and v [B, L, H, D], bias [B, L].

    Returns [B, N, H, D]. `interpret`: on any platform, slowly. Lengths are such as `pays` allows.
    """
    q, k, v = (x.transpose(0, 2, 3, 1) for x in (q, k, v))
    if bias is None:
        bias = jnp.zeros((k.shape[0], k.shape[3]))
    return _attention(q, k, v, bias.astype(jnp.float32), interpret).transpose(0, 3, 1, 2)


def split(kernel: Callable[..., jax.Array], batch: int, heads: int) -> Callable | None:
    """`kernel` of [B, N, H, D] arrays on each device's own examples and heads, by the context's
    mesh (`jax.set_mesh`); None where that is missing on several devices, or leaves examples over.

    XLA splits no kernel by itself. The axis "tensor" splits heads where it can, all others rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel if jax.device_count() == 1 else None
    rows = tuple(axis for axis in mesh.axis_names if axis != "tensor")
    if batch % math.prod(mesh.shape[axis] for axis in rows):
        return None
    tensor = "tensor" in mesh.axis_names and heads % mesh.shape["tensor"] == 0
    spec = PartitionSpec(rows, None, "tensor" if tensor else None)

    def on_each(q, k, v, *bias):
        specs = (spec,) * 3 + (PartitionSpec(rows),) * len(bias)
        return jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)(
            q, k, v, *bias
        )

    return on_each


def block_of(length: int, keys: int) -> int:
    """Queries at a time: a power of 2 that divides `length`, as large as LOGITS allows."""
    return math.gcd(length, max(LANES, 2 ** int(math.log2(LOGITS // keys))))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bias, interpret):
    return _forward(q, k, v, bias, interpret)[0]


def _forward(q, k, v, bias, interpret):
    out, lse = _call(_forward_kernel, (q, k, v, bias[:, None, :, None]), interpret)
    return out, (q, k, v, bias, out, lse)


def _backward(interpret, kept, d_out):
    q, k, v, bias, out, lse = kept
    inputs = (q, k, v, bias[:, None, :, None], out, lse, d_out)
    dq, dk, dv, d_bias = _call(_backward_kernel, inputs, interpret)
    return dq, dk, dv, jnp.sum(d_bias, axis=(1, 3))


_attention.defvjp(_forward, _backward)

_dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_NN, _NT = ((((1,), (i,)), ((), ())) for i in (0, 1))


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, lse_ref, k_LxD):
    @pl.when(pl.program_id(2) == 0)
    def _():
        k_LxD[...] = k_ref[0, 0].T

    q_DxN, v_DxL = _scaled(q_ref[0, 0]), v_ref[0, 0]
    logits_LxN = _dot(k_LxD[...], q_DxN, _NN) + bias_ref[0, 0]
    top_1xN = jnp.max(logits_LxN, axis=0, keepdims=True)
    weight_LxN = jnp.exp(logits_LxN - top_1xN)
    sum_1xN = jnp.sum(weight_LxN, axis=0, keepdims=True)
    out_DxN = _dot(v_DxL, weight_LxN.astype(v_DxL.dtype), _NN) / sum_1xN
    out_ref[0, 0] = out_DxN.astype(out_ref.dtype)
    lse_ref[0, 0] = top_1xN + jnp.log(sum_1xN)


def _backward_kernel(
    q_ref, k_ref, v_ref, bias_ref, out_ref, lse_ref, d_out_ref,
    dq_ref, dk_ref, dv_ref, d_bias_ref, k_LxD, v_LxD, dk_DxL, dv_DxL, d_bias_Lx1,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        k_LxD[...], v_LxD[...] = k_ref[0, 0].T, v_ref[0, 0].T
        for total in (dk_DxL, dv_DxL, d_bias_Lx1):
            total[...] = jnp.zeros_like(total)

    q_DxN, d_out_DxN = _scaled(q_ref[0, 0]), d_out_ref[0, 0]
    products_DxN = d_out_DxN.astype(jnp.float32) * out_ref[0, 0].astype(jnp.float32)
    delta_1xN = jnp.sum(products_DxN, axis=0, keepdims=True)
    logits_LxN = _dot(k_LxD[...], q_DxN, _NN) + bias_ref[0, 0]
    weight_LxN = jnp.exp(logits_LxN - lse_ref[0, 0])
    dv_DxL[...] += _dot(d_out_DxN, weight_LxN.astype(q_DxN.dtype), _NT)
    d_weight_LxN = _dot(v_LxD[...], d_out_DxN, _NN)
    d_logits_LxN = weight_LxN * (d_weight_LxN - delta_1xN)
    d_bias_Lx1[...] += jnp.sum(d_logits_LxN, axis=1, keepdims=True)
    d_logits_LxN = d_logits_LxN.astype(q_DxN.dtype)
    dk_DxL[...] += _dot(q_DxN, d_logits_LxN, _NT)
    dq_ref[0, 0] = _scaled(_dot(k_ref[0, 0], d_logits_LxN, _NN)).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[0, 0] = dk_DxL[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_DxL[...].astype(dv_ref.dtype)
        d_bias_ref[0, 0] = d_bias_Lx1[...]


def _scaled(q_DxN) -> jax.Array:
    return q_DxN * len(q_DxN) ** -0.5


def _call(kernel, inputs, interpret: bool):
    q, k = inputs[:2]
    batch, heads, width, n = q.shape
    keys, forward = k.shape[3], kernel is _forward_kernel
    block = block_of(n, keys)
    queries = pl.BlockSpec((1, 1, width, block), lambda b, h, i: (b, h, 0, i))
    whole = pl.BlockSpec((1, 1, width, keys), lambda b, h, i: (b, h, 0, 0))
    row = pl.BlockSpec((1, 1, 1, block), lambda b, h, i: (b, h, 0, i))
    column = pl.BlockSpec((1, 1, keys, 1), lambda b, h, i: (b, h, 0, 0))
    every = pl.BlockSpec((1, 1, keys, 1), lambda b, h, i: (b, 0, 0, 0))
    specs = [queries, whole, whole, every]
    turned = pltpu.VMEM((keys, width), k.dtype)
    if forward:
        out_specs = [queries, row]
        shapes = [q, jax.ShapeDtypeStruct((batch, heads, 1, n), jnp.float32)]
        scratch = [turned]
    else:
        specs += [queries, row, queries]
        out_specs = [queries, whole, whole, column]
        shapes = [*inputs[:3], jax.ShapeDtypeStruct((batch, heads, keys, 1), jnp.float32)]
        scratch = [turned] * 2 + [pltpu.VMEM((width, keys), jnp.float32)] * 2
        scratch += [pltpu.VMEM((keys, 1), jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
    pairs = batch * heads * n * keys
    padded = -(-width // LANES) * LANES
    cost = pl.CostEstimate(
        flops=2 * (2 if forward else 5) * pairs * padded,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *shapes)),
    )
    return pl.pallas_call(
        kernel,
        grid=(batch, heads, n // block),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"attention_{'forward' if forward else 'backward'}",
    )(*inputs)
