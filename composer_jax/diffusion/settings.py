"""What each setting of sampling may be, the same for a call, a command and a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer_jax.diffusion.grids import FINALS, SPACINGS
from composer_jax.diffusion.solvers import SOLVERS
from composer_jax.utils.values import SHARE, Allowed, choice, maybe, number, whole

WEIGHT = number(-1000.0, 1000.0)  # of guidance


def _is_span(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(map(SHARE.holds, value)) and value[0] < value[1]


SPAN = Allowed("START:END with 0 <= START < END <= 1", _is_span)
SETTINGS: dict[str, Allowed] = {
    "steps": whole(1, 10_000),
    "guidance": WEIGHT,
    "solver": choice(*SOLVERS),
    "spacing": choice(*SPACINGS),
    "steps_offset": whole(0, 1000),
    "final": choice(*FINALS),
    "shift": number(0.0, 1000.0, above=True),
    "eta": SHARE,
    "interval": SPAN,
    "rescale": SHARE,
    "autoguidance": WEIGHT,
    "start": number(0.0, 1.0, above=True),
    "batch": maybe(whole(1, 65_536)),
}


def check_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError, one line, for a value that sampling cannot take, or for `eta` beside a
    solver that adds no noise. `prefix`: of the names in the message."""
    for name, value in settings.items():
        SETTINGS[name].check(prefix + name, value)
    solver = settings.get("solver", "ddim")
    if settings.get("eta") and solver != "ddim":
        raise ValueError(f"{prefix}eta is for the solver ddim; {solver} takes none")
