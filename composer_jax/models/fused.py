"""Softmax attention as one Pallas kernel a direction, for TPUs (arXiv 2205.14135, 2307.08691).

XLA writes the logits of long sequences to memory, several times for a gradient: 64 x 64 positions
of 8 heads are 1 GiB for 4 images. Here a head's keys and values stay in the chip's vector memory,
and logits exist for one block of queries at a time. A gradient computes them again from the stored
logarithm of their sums: five products, where the forward pass has two.
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

LANES = 128  # a head's width is rounded up to this inside the chip
LOGITS = 2**20  # of one block, held in the vector memory
VMEM = 64 * 2**20


def pays(length: int, keys: int) -> bool:
    """Whether the kernels are quicker than XLA: a square of logits, neither small nor too large."""
    return length % LANES == 0 and keys % LANES == 0 and length >= 1024 <= keys <= 16384


def attention(q, k, v, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v for q [B, N, H, D], k and v [B, L, H, D]; returns [B, N, H, D].

    `interpret`: on any platform, slowly. Lengths are such as `pays` allows.
    """
    q = q * q.shape[-1] ** -0.5
    heads = [x.swapaxes(1, 2) for x in (q, k, v)]
    return _attention(*heads, interpret).swapaxes(1, 2)


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
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def block_of(length: int, keys: int) -> int:
    """Queries at a time: a power of 2 that divides `length`, as large as LOGITS allows."""
    return math.gcd(length, max(LANES, 2 ** int(math.log2(LOGITS // keys))))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, interpret):
    return _forward(q, k, v, interpret)[0]


def _forward(q, k, v, interpret):
    out, lse = _call(_forward_kernel, (q, k, v), 2, interpret)
    return out, (q, k, v, out, lse)


def _backward(interpret, kept, d_out):
    q, k, v, out, lse = kept
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    inputs = (q, k, v, d_out, lse, delta)
    return _call(_backward_kernel, inputs, 5, interpret)


_attention.defvjp(_forward, _backward)

_dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_NT, _NN, _TN = ((((i,), (j,)), ((), ())) for i, j in ((1, 1), (1, 0), (0, 0)))


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, lse_ref):
    q_NxD, k_LxD, v_LxD = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
    logits_NxL = _dot(q_NxD, k_LxD, _NT)
    top_Nx1 = jnp.max(logits_NxL, axis=1, keepdims=True)
    weight_NxL = jnp.exp(logits_NxL - top_Nx1)
    sum_Nx1 = jnp.sum(weight_NxL, axis=1, keepdims=True)
    out_NxD = _dot(weight_NxL.astype(v_LxD.dtype), v_LxD, _NN) / sum_Nx1
    out_ref[0, 0] = out_NxD.astype(out_ref.dtype)
    lse_ref[0, 0] = (top_Nx1 + jnp.log(sum_Nx1)).reshape(lse_ref.shape[2:])


def _backward_kernel(
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum
):
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    q_NxD, k_LxD, v_LxD, d_out_NxD = (r[0, 0] for r in (q_ref, k_ref, v_ref, d_out_ref))
    lse_1xN, delta_1xN = lse_ref[0, 0], delta_ref[0, 0]
    # transposed, so that the queries' statistics lie along the lanes
    weight_LxN = jnp.exp(_dot(k_LxD, q_NxD, _NT) - lse_1xN)
    dv_sum[...] += _dot(weight_LxN.astype(q_NxD.dtype), d_out_NxD, _NN)
    d_weight_LxN = _dot(v_LxD, d_out_NxD, _NT)
    d_logits_LxN = (weight_LxN * (d_weight_LxN - delta_1xN)).astype(q_NxD.dtype)
    dk_sum[...] += _dot(d_logits_LxN, q_NxD, _NN)
    dq_ref[0, 0] = _dot(d_logits_LxN, k_LxD, _TN).astype(dq_ref.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)


def _call(kernel, inputs, products: int, interpret: bool):
    q, k = inputs[:2]
    batch, heads, n, width = q.shape
    keys = k.shape[2]
    block = block_of(n, keys)
    queries = pl.BlockSpec((1, 1, block, width), lambda b, h, i: (b, h, i, 0))
    whole = pl.BlockSpec((1, 1, keys, width), lambda b, h, i: (b, h, 0, 0))
    row = pl.BlockSpec((1, 1, 1, block), lambda b, h, i: (b, h, 0, i))
    statistics = jax.ShapeDtypeStruct((batch, heads, 1, n), jnp.float32)
    if products == 2:
        specs, out_specs = [queries, whole, whole], [queries, row]
        shapes, scratch = [jax.ShapeDtypeStruct(q.shape, q.dtype), statistics], []
    else:
        specs = [queries, whole, whole, queries, row, row]
        out_specs = [queries, whole, whole]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3]]
        scratch = [pltpu.VMEM((keys, width), jnp.float32)] * 2
    padded = -(-width // LANES) * LANES
    pairs = batch * heads * n * keys
    moved = batch * heads * padded * q.dtype.itemsize * (2 * n + 2 * keys)
    cost = pl.CostEstimate(
        flops=2 * products * pairs * padded,
        transcendentals=pairs,
        bytes_accessed=moved if products == 2 else 2 * moved - batch * heads * n * padded * 2,
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
        name=f"attention_{products}",
    )(*inputs)
