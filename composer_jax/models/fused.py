"""Softmax attention as one Pallas kernel a direction, for TPUs (arXiv 2205.14135, 2307.08691).

XLA writes the logits of long sequences to memory, several times for a gradient: 64 x 64 positions
of 8 heads are 1 GiB for 4 images. Here a head's keys and values stay in the chip's vector memory,
and logits exist for one block of queries at a time. A gradient computes them again from the stored
logarithm of their sums: five products, where the forward pass has two.

Positions lie along the chip's lanes: heads of 40 features need no padding in memory, XLA hands them
over as its projections write them, and the softmax's sums run over whole registers. A sequence over
itself comes as one array of q, k and v, and so does its gradient: one product makes it, one takes
it back.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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


def packed_attention(qkv, interpret: bool = False) -> jax.Array:
    """`attention` of a sequence over itself, from its projection qkv [B, N, H, 3, D].

    Returns [B, N, H, D]; the gradient is one array, too. N is such as `pays` allows.
    """
    return _packed(qkv.transpose(0, 2, 3, 4, 1), interpret).transpose(0, 3, 1, 2)


def block_of(length: int, keys: int) -> int:
    """Queries at a time: a power of 2 that divides `length`, as large as LOGITS allows."""
    return math.gcd(length, max(LANES, 2 ** int(math.log2(LOGITS // keys))))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bias, interpret):
    return _forward(q, k, v, bias, interpret)[0]


def _forward(q, k, v, bias, interpret):
    sizes = (*q.shape, k.shape[3])
    inputs, outputs = _inputs(sizes, q, k, v, bias), _outputs(sizes, q.dtype)
    scratch = _turned(sizes, q.dtype, 1)
    out, lse = _call(_forward_kernel, sizes, inputs, outputs, scratch, 2, interpret)
    return out, (q, k, v, bias, out, lse)


def _backward(interpret, kept, d_out):
    q, k, v, bias, out, lse = kept
    sizes = (*q.shape, k.shape[3])
    of_q, of_k, of_v, of_bias = _inputs(sizes, q, k, v, bias)
    batch, heads, _, _, keys = sizes
    d_bias = jax.ShapeDtypeStruct((batch, heads, keys, 1), jnp.float32)
    column = pl.BlockSpec((1, 1, keys, 1), lambda b, h, i: (b, h, 0, 0))
    scratch = _turned(sizes, q.dtype, 2) + _totals(sizes) + [pltpu.VMEM((keys, 1), jnp.float32)]
    inputs = of_q, of_k, of_v, of_bias, *_results(sizes, out, lse, d_out)
    outputs = of_q, of_k, of_v, (d_bias, column)
    dq, dk, dv, d_bias = _call(_backward_kernel, sizes, inputs, outputs, scratch, 5, interpret)
    return dq, dk, dv, jnp.sum(d_bias, axis=(1, 3))


_attention.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _packed(qkv, interpret):
    return _packed_forward(qkv, interpret)[0]


def _packed_forward(qkv, interpret):
    sizes, inputs = _parts(qkv)

    def kernel(q_ref, k_ref, v_ref, *rest):
        _forward_kernel(q_ref, k_ref, v_ref, None, *rest)

    outputs, scratch = _outputs(sizes, qkv.dtype), _turned(sizes, qkv.dtype, 1)
    out, lse = _call(kernel, sizes, inputs, outputs, scratch, 2, interpret)
    return out, (qkv, out, lse)


def _packed_backward(interpret, kept, d_out):
    qkv, out, lse = kept
    sizes, inputs = _parts(qkv)
    inputs += _results(sizes, out, lse, d_out)
    whole = pl.BlockSpec((1, 1, *qkv.shape[2:]), lambda b, h, i: (b, h, 0, 0, 0))

    def kernel(q_ref, k_ref, v_ref, out_ref, lse_ref, d_out_ref, d_ref, *scratch):
        block = q_ref.shape[3]
        here = pl.ds(pl.program_id(2) * block, block)
        parts = d_ref.at[:, :, 0, :, here], d_ref.at[:, :, 1], d_ref.at[:, :, 2]
        given = q_ref, k_ref, v_ref, None, out_ref, lse_ref, d_out_ref
        _backward_kernel(*given, *parts, None, *scratch, None)

    scratch = _turned(sizes, qkv.dtype, 2) + _totals(sizes)
    return tuple(_call(kernel, sizes, inputs, ((qkv, whole),), scratch, 5, interpret))


_packed.defvjp(_packed_forward, _packed_backward)

_dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_NN, _NT = ((((1,), (i,)), ((), ())) for i in (0, 1))


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, lse_ref, k_LxD):
    @pl.when(pl.program_id(2) == 0)
    def _():
        k_LxD[...] = k_ref[0, 0].T

    q_DxN, v_DxL = _scaled(q_ref[0, 0]), v_ref[0, 0]
    logits_LxN = _logits(k_LxD, q_DxN, bias_ref)
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
    biased = bias_ref is not None

    @pl.when(pl.program_id(2) == 0)
    def _():
        k_LxD[...], v_LxD[...] = k_ref[0, 0].T, v_ref[0, 0].T
        for total in (dk_DxL, dv_DxL, d_bias_Lx1)[: 2 + biased]:
            total[...] = jnp.zeros_like(total)

    q_DxN, d_out_DxN = _scaled(q_ref[0, 0]), d_out_ref[0, 0]
    products_DxN = d_out_DxN.astype(jnp.float32) * out_ref[0, 0].astype(jnp.float32)
    delta_1xN = jnp.sum(products_DxN, axis=0, keepdims=True)
    weight_LxN = jnp.exp(_logits(k_LxD, q_DxN, bias_ref) - lse_ref[0, 0])
    dv_DxL[...] += _dot(d_out_DxN, weight_LxN.astype(q_DxN.dtype), _NT)
    d_weight_LxN = _dot(v_LxD[...], d_out_DxN, _NN)
    d_logits_LxN = weight_LxN * (d_weight_LxN - delta_1xN)
    if biased:
        d_bias_Lx1[...] += jnp.sum(d_logits_LxN, axis=1, keepdims=True)
    d_logits_LxN = d_logits_LxN.astype(q_DxN.dtype)
    dk_DxL[...] += _dot(q_DxN, d_logits_LxN, _NT)
    dq_ref[0, 0] = _scaled(_dot(k_ref[0, 0], d_logits_LxN, _NN)).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[0, 0] = dk_DxL[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_DxL[...].astype(dv_ref.dtype)
        if biased:
            d_bias_ref[0, 0] = d_bias_Lx1[...]


def _logits(k_LxD, q_DxN, bias_ref) -> jax.Array:
    logits_LxN = _dot(k_LxD[...], q_DxN, _NN)
    return logits_LxN if bias_ref is None else logits_LxN + bias_ref[0, 0]


def _scaled(q_DxN) -> jax.Array:
    return q_DxN * len(q_DxN) ** -0.5


# Arrays and the blocks that a kernel takes of them. `sizes`: B, H, D, N, L.


def _features(width: int, length: int, part=(), moving: bool = False) -> pl.BlockSpec:
    """A head's [D, length] of [B, H, D, N], or of `part` i of [B, H, 3, D, N]."""
    shape = (1, 1, *(None for _ in part), width, length)
    return pl.BlockSpec(shape, lambda b, h, i: (b, h, *part, 0, i if moving else 0))


def _inputs(sizes, q, k, v, bias):
    _, _, width, n, keys = sizes
    every = pl.BlockSpec((1, 1, keys, 1), lambda b, h, i: (b, 0, 0, 0))
    whole = _features(width, keys)
    queries = _features(width, block_of(n, keys), moving=True)
    return (q, queries), (k, whole), (v, whole), (bias[:, None, :, None], every)


def _parts(qkv):
    """Sizes and inputs of packed attention: one array, three times, by its parts."""
    batch, heads, _, width, n = qkv.shape
    queries = _features(width, block_of(n, n), (0,), moving=True)
    specs = queries, *(_features(width, n, (part,)) for part in (1, 2))
    return (batch, heads, width, n, n), tuple((qkv, spec) for spec in specs)


def _outputs(sizes, dtype):
    """The result and the logarithms of the softmax's sums."""
    batch, heads, width, n, keys = sizes
    block = block_of(n, keys)
    row = pl.BlockSpec((1, 1, 1, block), lambda b, h, i: (b, h, 0, i))
    out = jax.ShapeDtypeStruct((batch, heads, width, n), dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, 1, n), jnp.float32)
    return (out, _features(width, block, moving=True)), (lse, row)


def _results(sizes, out, lse, d_out):
    """What a gradient takes beside the forward pass's inputs: its outputs, and their gradient."""
    (_, features), (_, row) = _outputs(sizes, out.dtype)
    return (out, features), (lse, row), (d_out, features)


def _turned(sizes, dtype, count: int) -> list:
    return [pltpu.VMEM((sizes[4], sizes[2]), dtype)] * count


def _totals(sizes) -> list:
    return [pltpu.VMEM((sizes[2], sizes[4]), jnp.float32)] * 2


def _call(kernel, sizes, inputs, outputs, scratch, products: int, interpret: bool):
    """`products`: how many a pair of query and key takes part in: 2 forward, 5 backward."""
    batch, heads, width, n, keys = sizes
    pairs, padded = batch * heads * n * keys, -(-width // LANES) * LANES
    arrays = {id(x): x for x, _ in (*inputs, *outputs)}.values()  # by parts is once
    cost = pl.CostEstimate(
        flops=2 * products * pairs * padded,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
    return pl.pallas_call(
        kernel,
        grid=(batch, heads, n // block_of(n, keys)),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"attention_{'forward' if products == 2 else 'backward'}",
    )(*(x for x, _ in inputs))
