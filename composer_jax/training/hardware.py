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

    `kinds`: what jax says as device_kind. `link`: one way, all of a device's links together, or
    None where nobody plans over it. `scoped`: KiB of a TPU's vector memory for single fusions.
    `axes`: of a TPU's topologies. `config`: libtpu's name of how a chip's two cores are devices.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float | None = None
    scoped: int | None = None
    axes: int = 2
    config: str = ""


GIB = 2**30
# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, whose interconnect figures for v5p, v6e
# and tpu7x (1200, 800 and 1200 GB/s a chip) count both ways. A v4 chip's two cores are one device
# (megacore), tpu7x's are two, each with half of the chip. GPUs: NVIDIA's data sheets.
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9, axes=3, config="megacore"),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 50_000),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 600e9, 50_000, axes=3),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 400e9, 98_304),
    "tpu7x": Chip(("TPU7x",), 1153.5e12, 96 * GIB, 3690e9, 300e9, axes=3),
    "b200": Chip(("NVIDIA B200",), 2250e12, 179 * GIB, 8000e9),
    "gh200": Chip(("NVIDIA GH200 480GB",), 989e12, 95 * GIB, 4000e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 140 * GIB, 4800e9),
    "h200-nvl": Chip(("NVIDIA H200 NVL",), 835e12, 140 * GIB, 4800e9),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9),
    "h100-pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 80 * GIB, 2000e9),
    "h100-nvl": Chip(("NVIDIA H100 NVL",), 835e12, 93 * GIB, 3900e9),
    "a100-80gb": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GIB, 2039e9),
    "a100-80gb-pcie": Chip(("NVIDIA A100 80GB PCIe",), 312e12, 80 * GIB, 1935e9),
    "a100-40gb": Chip(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40 * GIB, 1555e9),
    "l40s": Chip(("NVIDIA L40S",), 362e12, 45 * GIB, 864e9),
    "l4": Chip(("NVIDIA L4",), 121e12, 22 * GIB, 300e9),
    "a40": Chip(("NVIDIA A40",), 149.7e12, 45 * GIB, 696e9),
    "a30": Chip(("NVIDIA A30",), 165e12, 24 * GIB, 933e9),
    "a10": Chip(("NVIDIA A10",), 125e12, 22 * GIB, 600e9),
}
PLANNED = tuple(name for name, chip in CHIPS.items() if chip.link)
# libtpu for chips that this machine lacks: asks no machine, takes no chip, logs nothing of it
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # of this machine; topologies name their own
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by jax's `device_kind`, None where that very kind is not known."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


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
    """The devices of "here", or of hardware that this machine lacks: "v5p:4x4x4", "v5e:4x4".

    A shape counts chips; a chip of tpu7x is two devices, of all others one.

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
    axes = CHIPS[name].axes
    example = f"{name}:{'2x2x1' if axes == 3 else '4x4'}"
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), shape):
        raise ValueError(f"topology {topology!r}: {name} comes in {axes} dimensions, for example "
                         f"{example}; each is a whole number from 1")  # fmt: skip
    for key, value in WITHOUT_TPU.items():
        os.environ.setdefault(key, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "planning for a TPU from elsewhere needs libtpu: pip install 'composer-jax[tpu]'"
        ) from error
    from jax.experimental import topologies

    options = {"chip_config_name": CHIPS[name].config} if CHIPS[name].config else {}
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **options)
        return list(found.devices)
    except Exception as error:  # jaxlib raises its runtime error, and others by version
        reason = str(error).strip().splitlines()[0][:200]
        message = f"no topology {topology!r} ({reason}); for example {example}"
        raise ValueError(message) from error
