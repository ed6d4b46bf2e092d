"""Optimizers by name, learning rates by step and by parameter."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from composer_jax.conditions.base import meant
from composer_jax.models.files import dotted

OPTIMIZERS = ("adamw", "muon")
MU_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
# Muon's updates get the size of Adam's (arXiv 2502.16982), so that one learning rate serves both
MUON_RMS = 0.2
NOT_MUON = r"conv_in|conv_out|^embeddings|^tokens"  # first and last layers, by what is usual


def make_optimizer(
    learning_rate: float,
    steps: int,
    warmup: int,
    decay: float,
    weight_decay: float,
    clip: float,
    betas: tuple[float, float],
    name: str = "adamw",
    schedule: str = "linear",
    groups: Sequence[tuple[str, float]] = (),
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW or Muon, with a clipped gradient, a schedule, and learning rates for groups.

    `warmup`, `decay`, `schedule`: see `make_schedule`. `clip`: largest global norm of a gradient.
    `name` "muon": kernels of inner layers by Muon, the rest by AdamW, with Nesterov's momentum.
    `groups`: (pattern, factor) pairs; the first pattern found in a parameter's dotted path scales
    its learning rate. `mu_dtype`: what the first moment is kept in, float32 or bfloat16, which
    costs no quality (arXiv 2106.04560, 3.4); it is computed in float32. Raises ValueError for an
    unknown name or dtype, and, when its state is made, for a pattern that finds no parameter.
    """
    if mu_dtype not in MU_DTYPES:
        raise ValueError(f"optimizer.mu_dtype {mu_dtype!r}{meant(mu_dtype, MU_DTYPES)}; allowed: "
                         f"{', '.join(MU_DTYPES)}")  # fmt: skip
    rate = make_schedule(learning_rate, steps, warmup, decay, schedule)
    if name == "adamw":
        chosen = optax.adamw(rate, *betas, weight_decay=weight_decay, mu_dtype=mu_dtype)
    elif name == "muon":
        chosen = muon(
            rate,
            adam_b1=betas[0],
            adam_b2=betas[1],
            weight_decay=weight_decay,
            mu_dtype=mu_dtype,
            adam_weight_decay=weight_decay,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_muon_axes,
        )
    else:
        raise ValueError(f"no optimizer {name!r}{meant(name, OPTIMIZERS)}; there are "
                         f"{', '.join(OPTIMIZERS)}")  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(clip), chosen, _scaled(groups))


def make_schedule(
    learning_rate: float, steps: int, warmup: int, decay: float, schedule: str
) -> optax.Schedule:
    """Learning rate by step: a linear warm-up over `warmup` steps, then constant, then falling.

    It falls over the last share `decay` of `steps`: to 0 by "linear" or "cosine", or with
    1 / sqrt(step) by "rsqrt" (arXiv 2312.02696, eq. 67); "constant" never falls. Raises
    ValueError for an unknown schedule.
    """
    start = max(warmup, steps - round(steps * decay))
    length = max(steps - start, 1)
    falling = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, length),
        "cosine": optax.cosine_decay_schedule(learning_rate, length),
        "rsqrt": lambda step: learning_rate / jnp.sqrt(1.0 + step / max(start, 1)),
    }
    if schedule not in falling:
        raise ValueError(f"no schedule {schedule!r}{meant(schedule, SCHEDULES)}; there are "
                         f"{', '.join(SCHEDULES)}")  # fmt: skip
    constant = optax.constant_schedule(learning_rate)
    rising = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([rising, constant, falling[schedule]], [warmup, start])


def _muon_axes(params):
    """For kernels that Muon takes, which axes it sums over and which it gives; else None."""

    def axes(path, leaf):
        name = dotted(path)
        if not name.endswith("kernel") or re.search(NOT_MUON, name) or leaf.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)


def _scaled(groups: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def group(path) -> int | None:
        """The first of `groups` that a parameter is of."""
        return next((i for i, (p, _) in enumerate(groups) if re.search(p, dotted(path))), None)

    def init(params):
        found = {group(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        for i, (pattern, _) in enumerate(groups):
            if i not in found:
                raise ValueError(f"optimizer.groups: {pattern!r} finds no parameter of its own")
        return optax.EmptyState()

    def scale(updates, state, params=None):
        del params

        def scaled(path, leaf):
            number = group(path)
            return leaf if number is None else groups[number][1] * leaf

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, scale)
