"""How to sample: the settings of a call, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from composer_jax.diffusion import Use
from composer_jax.diffusion.process import one_of
from composer_jax.diffusion.settings import check_settings
from composer_jax.utils.values import shown

GRID = ("spacing", "steps_offset", "final", "shift")  # fields that `Process.times` takes
OUTPUTS = ("images", "latents")
EXTRAS = ("image", "noise", "keep", "preview", "every", "output")  # of a call, beside `Options`


@dataclass(frozen=True)
class Options:
    """How to sample.

    `steps`, `solver`, and the grid as `Process.times` has it: `spacing`, `steps_offset` (of
    "leading" spacing), `final` noise ("zero" or "sigma_min"), `shift` (of the flow schedule).
    `guidance`: classifier-free guidance weight, 1 for none, in effect inside `interval`, a share of
    sampling as the window of a `use` is. `eta`: noise of solver "ddim", 0 to 1. `rescale`: share of
    guidance's contrast that is taken back, 0 to 1. `autoguidance`: weight against the pipeline's
    `guide`, 1 for none. `start`: process time that sampling begins at, below 1 from an image
    diffused so far. `batch`: images at a time, by default as many as fill a machine; it changes an
    image in its last bits.
    """

    steps: int = 20
    guidance: float = 3.0
    solver: str = "dpmpp2m"
    spacing: str = "uniform"
    steps_offset: int = 0
    final: str = "zero"
    shift: float = 1.0
    eta: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    autoguidance: float = 1.0
    start: float = 1.0
    batch: int | None = None

    def __post_init__(self):
        check_settings(asdict(self))

    def but(self, **changes: Any) -> Options:
        """The same with what is not None of `changes`; raises ValueError for an unknown name.

        What belongs to another solver or spacing than the changed one goes back to its default.
        """
        for name in changes:
            one_of("option", name, tuple(f.name for f in fields(self)))
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("solver", self.solver) != self.solver:
            given.setdefault("eta", 0.0)
        if given.get("spacing", self.spacing) != self.spacing:
            given.setdefault("steps_offset", 0)
        return replace(self, **given)


def check_extras(
    options: Options, extras: Mapping[str, Any], inversion: bool = False, probe: bool = False
) -> None:
    """Raises ValueError for one of `EXTRAS` that is wrong, or that nothing takes: in a call, an
    `inversion`, or the `probe` of a conflict."""
    one_of("output", extras.get("output", OUTPUTS[0]), OUTPUTS)
    every = extras.get("every", 1)
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"every is {every!r}; a whole number from 1 is wanted")
    if not callable(extras.get("preview", print)):
        raise ValueError(f"preview is {shown(extras['preview'])}; a function is wanted")
    if "every" in extras and "preview" not in extras:
        raise ValueError("every is for preview, which is not given")
    if probe and "output" in extras:
        raise ValueError("a conflict takes no output; it gives cosines")
    if inversion:
        said = {"start": options.start < 1.0, "eta": options.eta}
        said |= {name: name in extras for name in ("noise", "output")}
        for name, given in said.items():
            if given:
                raise ValueError(f"an inversion takes no {name}")
    elif "image" in extras and options.start == 1.0 and "keep" not in extras:
        raise ValueError(
            "image does nothing: start is 1, pure noise; give start below 1 to begin from the "
            "image, or keep to hold a part of it"
        )


def idle(
    options: Options,
    said: Mapping[str, Any],
    uses: Mapping[str, Sequence[Use]],
    noise: bool,
    seeds: Sequence[tuple[int, int]],
) -> Iterator[str]:
    """A line for each setting in `said`, negative use and seed that changes nothing beside the rest
    of a call; `noise`: it is given."""
    weights = [options.guidance, options.autoguidance]
    weights += [one.scale for ones in uses.values() for one in ones if one.scale is not None]
    if "interval" in said and tuple(options.interval) != (0.0, 1.0) and max(weights) <= 1.0:
        yield "interval does nothing: no guidance is above 1"
    if said.get("rescale") and all(weight == 1.0 for weight in weights):
        yield "rescale does nothing: guidance is 1"
    for name, ones in uses.items():
        if options.guidance == 1.0 and any(one.negative for one in ones):
            yield f"the negative {name} does nothing: guidance is 1"
    if noise and not options.eta and any(seed for seed, _ in seeds):
        yield "seed does nothing: the noise is given, or is an image's own, and eta is 0"
