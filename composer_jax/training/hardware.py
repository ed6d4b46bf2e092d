"""What accelerators can do: one table for the trainer's utilisation and for plans."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import jax

from composer_jax.conditions.base import meant


@dataclass(frozen=True)
class Chip:
    """One device: bf16 FLOP/s without sparsity, bytes of memory, bytes/s of it and of its links.

    `kind`: the start of jax's device_kind. `link`: one way, all of a chip's links together, or None
    where nobody plans over it. `scoped`: KiB of a TPU's vector memory for single fusions.
    """

    kind: str
    flops: float
    memory: int
    bandwidth: float
    link: float | None = None
    scoped: int | None = None


GIB = 2**30
# TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e}, whose interconnect figures for v5p and v6e (1200
# and 800 GB/s a chip) count both ways; GPUs: NVIDIA's data sheets of the SXM forms
CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9, 50_000),
    "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, 50_000),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1640e9, 400e9, 98_304),
    "h100": Chip("NVIDIA H100", 989e12, 80 * GIB, 3350e9),
    "h200": Chip("NVIDIA H200", 989e12, 141 * GIB, 4800e9),
    "a100": Chip("NVIDIA A100", 312e12, 80 * GIB, 2039e9),
}
PLANNED = ("v5e", "v5p", "v6e")


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by jax's `device_kind`, None where it is not known."""
    return next((c for c in CHIPS.values() if device_kind.startswith(c.kind)), None)


def compiler_options(device) -> dict[str, bool | int]:
    """What training asks of XLA on such a device, beside its defaults."""
    if device.platform != "tpu":
        return {}
    # With few examples a chip, XLA cuts images into strips and takes these for a batch. Their
    # margins are copied around every convolution: a resnet at 64 x 64 x 320, 4 examples, forward
    # and backward on v5p, moves 2.8 GB in 1.51 ms by the compiler's estimate, without 0.73 in 0.67.
    options = {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    }
    # More of the vector memory for a fusion's own tiles, less for arrays fetched ahead of their
    # use; the sizes are those that public trainers of language models set for these chips. By the
    # estimate the same resnet: 0.73 to 0.66 ms, a transformer at 64 x 64 x 320: 4.36 to 3.96 ms.
    chip = chip_of(device.device_kind)
    if chip is not None and chip.scoped:
        options["xla_tpu_scoped_vmem_limit_kib"] = chip.scoped
    return options


def step_flops(compiled, device) -> float:
    """A device's FLOPs of a compiled program, by XLA; 0 where it does not say.

    On a GPU it does not: its count leaves out what cuDNN and cuBLAS do (of `scenes64` on an H200 it
    had 0.15 of 2.16 TFLOP), and before compilation jax counts nothing there.
    """
    counted = compiled.cost_analysis() if device.platform != "gpu" else None
    return float((counted or {}).get("flops", 0.0))


def devices_of(topology: str) -> list:
    """The devices of "here", or of hardware that is not there: "v5p:4x4x4", "v5e:4x4".

    Raises ValueError, one line, for an unknown chip, an impossible shape, or no libtpu.
    """
    if topology == "here":
        return jax.devices()
    name, _, shape = topology.partition(":")
    if name not in PLANNED:
        raise ValueError(
            f"topology {topology!r}: no chip {name!r}{meant(name, PLANNED)}; there are "
            f"{', '.join(PLANNED)}, or 'here'"
        )
    axes = 3 if name == "v5p" else 2
    example = "2x2x1" if axes == 3 else "4x4"
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), shape):
        raise ValueError(f"topology {topology!r}: {name} comes in {axes} dimensions, for example "
                         f"{name}:{example}")  # fmt: skip
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no chip is asked or taken
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "a TPU that is not there needs libtpu: pip install 'composer-jax[tpu]'"
        ) from error
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # jaxlib raises its runtime error, and others by version
        reason = str(error).strip().splitlines()[0][:200]
        message = f"no topology {topology!r} ({reason}); for example {name}:{example}"
        raise ValueError(message) from error
