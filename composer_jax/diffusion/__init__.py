"""Pure math of diffusion, no networks: the process, the solvers, the guidance plan."""

from composer_jax.diffusion.guidance import (
    Plan,
    bank,
    build_plan,
    mix,
    rescale,
    trimmed,
)
from composer_jax.diffusion.inversion import inversion_times, invert
from composer_jax.diffusion.process import Process
from composer_jax.diffusion.solvers import (
    SOLVERS,
    evaluation_times,
    sample,
    solver_evaluations,
)
from composer_jax.diffusion.uses import Use, as_uses, check_spans, two_sets, use

__all__ = [
    "SOLVERS",
    "Plan",
    "Process",
    "Use",
    "as_uses",
    "bank",
    "build_plan",
    "check_spans",
    "evaluation_times",
    "inversion_times",
    "invert",
    "mix",
    "rescale",
    "sample",
    "solver_evaluations",
    "trimmed",
    "two_sets",
    "use",
]
