"""Described TPUs: libtpu's own topologies and compiler, without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from composer_jax.training.collectives import collectives
from composer_jax.training.hardware import CHIPS, chip_of, devices_of
from composer_jax.training.plan import compile_readably


@pytest.mark.parametrize(
    ("topology", "count"),
    [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8)],
)
def test_a_shape_counts_chips_and_compiles(topology, count, capfd):
    devices = devices_of(topology)
    assert len(devices) == count
    assert chip_of(devices[0].device_kind) is CHIPS[topology.partition(":")[0]]
    rows = NamedSharding(Mesh(devices, "x"), PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=rows)
    lowered = jax.jit(lambda x: (x.T @ x).sum()).lower(x)
    _, text = compile_readably(lowered, devices[0])
    assert collectives(text)["all-reduce"].bytes > 0
    assert capfd.readouterr().err == ""  # nothing of libtpu's log
