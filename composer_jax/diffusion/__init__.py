"""Pure math of diffusion, no networks: the process, the solvers, the guidance plan."""

from composer_jax.diffusion.guidance import Plan, Use, as_uses, build_plan, mix, two_sets, use
from composer_jax.diffusion.process import Process
from composer_jax.diffusion.solvers import (
    SOLVERS,
    evaluation_times,
    invert,
    sample,
    solver_evaluations,
)

__all__ = [
    "SOLVERS",
    "Plan",
    "Process",
    "Use",
    "as_uses",
    "build_plan",
    "evaluation_times",
    "invert",
    "mix",
    "sample",
    "solver_evaluations",
    "two_sets",
    "use",
]
