"""Averages of parameters by power functions, and of any length afterwards (EDM2, arXiv 2312.02696).

A power-function average weighs step tau of t by tau^gamma: it forgets in proportion to how long
training has lasted. Its length is the standard deviation of that weight over t, so that 0.05 and
0.10 mean a twentieth and a tenth of training. Averages of two lengths, kept every so often, give
that of any length by least squares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.models.files import Tensor, open_tensors, write_tensors
from composer_jax.utils.values import number

SHORTEST, LONGEST = 0.001, 0.28  # gamma = 0, all steps alike, has 0.2887


def gamma_of(length: float) -> float:
    """The exponent of an average of a relative length (eq. 2 and algorithm 2 of the paper).

    Raises ValueError for a length outside [0.001, 0.28].
    """
    number(SHORTEST, LONGEST).check("EMA length", length)
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


def average(old, params, step: jax.Array, length: float):
    """The average after `step` (from 1) of what it was and the new parameters (eq. 127)."""
    beta = (1.0 - 1.0 / step.astype(jnp.float32)) ** (gamma_of(length) + 1.0)
    return jax.tree.map(lambda a, p: beta * a + (1.0 - beta) * p, old, params)


def weights(steps: Sequence[int], lengths: Sequence[float], step: int, length: float) -> np.ndarray:
    """How to add up averages of `lengths`, taken at `steps`, for that of `length` at `step`.

    `steps` and `lengths` run in parallel; returns float64 [n]: the least squares of the weights'
    difference over all steps (algorithm 3 of the paper).
    """
    t = np.asarray([*steps, step], np.float64)
    gamma = np.asarray([gamma_of(one) for one in [*lengths, length]])
    # the inner product of t1's and t2's weights is an integral over the steps that both have
    t_a, t_b, g_a, g_b = t[:, None], t[None, :], gamma[:, None], gamma[None, :]
    ratio = np.where(t_a < t_b, (t_a / t_b) ** g_b, (t_b / t_a) ** g_a)
    inner = (g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    return np.linalg.lstsq(inner[:-1, :-1], inner[:-1, -1], rcond=None)[0]


def snapshot_path(workdir: Path, step: int, length: float) -> Path:
    """Where the average of `length` after `step` is kept."""
    return workdir / "ema" / f"{step:08d}-{length:g}.safetensors"


def write_snapshot(path: Path, tensors: dict[str, Tensor]) -> None:
    """Keeps an average in float16, in one move."""
    write_tensors(path, {name: tensor.cast("float16") for name, tensor in tensors.items()})


def reconstruct(workdir: Path, length: float, step: int | None = None) -> tuple[int, dict]:
    """The step, and the parameters by name, of the average of `length` after `step`.

    `step`: by default that of the newest snapshot. Tensors are added up one by one when they are
    read. Raises ValueError where `workdir` holds no snapshot, or none as old as `step`.
    """
    found = {}
    for path in (workdir / "ema").glob("*.safetensors"):
        if name := re.fullmatch(r"(\d+)-([\d.]+)", path.stem):
            found[int(name[1]), float(name[2])] = path
    if not found:
        raise ValueError(f"{workdir} holds no snapshot of averages; set config.ema_lengths")
    taken = sorted({at for at, _ in found})
    step = taken[-1] if step is None else step
    if step not in taken:
        raise ValueError(f"{workdir} has snapshots of steps {taken}; {step} is none of them")
    used = sorted(key for key in found if key[0] <= step)
    factors = weights([at for at, _ in used], [long for _, long in used], step, length)
    files = [open_tensors(found[key]) for key in used]

    def mixed(name: str) -> Tensor:
        def read() -> np.ndarray:
            pairs = zip(factors, files, strict=True)
            return sum(f * t[name].read().astype(np.float64) for f, t in pairs).astype(np.float32)

        return Tensor(files[0][name].shape, np.dtype(np.float32), read)

    return step, {name: mixed(name) for name in files[0]}
