"""What networks say of the context's mesh (`jax.set_mesh`) where XLA does not find it by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec


def split(kernel: Callable[..., jax.Array], batch: int, heads: int) -> Callable | None:
    """`kernel` of [B, N, H, ...] arrays on each device's own examples and heads, by the mesh;
    None where that is missing on several devices, or leaves examples over.

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

    def on_each(*inputs):
        specs = tuple(PartitionSpec(rows) if x.ndim == 2 else spec for x in inputs)  # 2: a bias
        return jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)(*inputs)

    return on_each


def scattered(kernel: jax.Array, axis: int) -> jax.Array:
    """`kernel`, whose gradient is summed over the devices in parts: each gets its own of `axis`.

    For what is made of parameters that lie so: XLA sums a gradient in parts where its product is
    split at once, and whole, which is twice the traffic, where it is first taken apart.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape.get("fsdp", 1)
    if parts == 1 or kernel.shape[axis] % parts:
        return kernel
    spec = [PartitionSpec.UNCONSTRAINED] * kernel.ndim
    spec[axis] = "fsdp"
    return _scattered(kernel, PartitionSpec(*spec))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scattered(kernel, spec: PartitionSpec) -> jax.Array:
    return kernel


def _scattered_forward(kernel, spec):
    return kernel, None


def _scattered_backward(spec, _, gradient):
    # apart, or what takes it apart comes first again
    return (jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(gradient, spec)),)


_scattered.defvjp(_scattered_forward, _scattered_backward)
