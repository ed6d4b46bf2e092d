"""Mesh and shardings: which parameter is split over which axis is data, not code."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from composer_jax.models.files import dotted

AXES = ("data", "fsdp", "tensor")
TACTICS = ("replicate", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices with the axes data, fsdp, tensor; one -1 takes what is left.

    Raises ValueError where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"mesh {sizes}: sizes are positive, at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (known != len(devices) and -1 not in sizes):
        multiple = "a multiple of " * (-1 in sizes)
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} is for {multiple}{known} devices; "
            f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    return jax.make_mesh(
        tuple(sizes), AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def to_devices(tree, mesh: Mesh):
    """Puts this process's part of a batch, numpy arrays, on the mesh's devices."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(place, a), tree)


def shard_tree(tree, mesh: Mesh, rules: Sequence[tuple[str, str]]):
    """Shardings of a tree of arrays (or their shapes): the first rule whose pattern matches wins.

    `rules`: (regular expression on the dotted path, tactic) pairs. Tactics: "replicate"; "fsdp" or
    "tensor", the largest dimension that the axis divides. An optimizer's moments have their
    parameter's path at the end, so they are split like it. Raises ValueError for an unknown tactic.
    """

    def one(path, leaf):
        name = dotted(path)
        tactic = next((t for pattern, t in rules if re.search(pattern, name)), "replicate")
        return NamedSharding(mesh, _spec(leaf.shape, mesh, tactic))

    return jax.tree_util.tree_map_with_path(one, tree)


def gathered(params, shardings, dtype):
    """Parameters as a step computes with them (ZeRO-3, arXiv 1910.02054): none split over fsdp.

    What was is sent in `dtype`, that of computation, and its gradient comes back so, each device
    getting the sum of its own part. Left to itself XLA sends float32, or rather the examples.
    """
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda leaf, place: _gather(leaf, place, dtype), params, shardings)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf, place: NamedSharding, dtype) -> jax.Array:
    if "fsdp" not in place.spec:
        return leaf
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in place.spec))
    own = jax.lax.with_sharding_constraint(leaf.astype(dtype), place)
    return jax.lax.with_sharding_constraint(own, NamedSharding(place.mesh, whole))


def _gather_forward(leaf, place, dtype):
    return _gather(leaf, place, dtype), None


def _gather_backward(place, dtype, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, place).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


def _spec(shape: tuple[int, ...], mesh: Mesh, tactic: str) -> PartitionSpec:
    if tactic == "replicate":
        return PartitionSpec()
    if tactic not in TACTICS:
        raise ValueError(f"sharding tactic {tactic!r}; allowed: {', '.join(TACTICS)}")
    size = mesh.shape[tactic]
    fits = [i for i, n in enumerate(shape) if n % size == 0 and n >= size]
    if size == 1 or not fits:
        return PartitionSpec()
    best = max(fits, key=lambda i: shape[i])
    return PartitionSpec(*(tactic if i == best else None for i in range(len(shape))))
