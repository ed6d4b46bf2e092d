"""The sampler: any subset of conditions, weighed, windowed and mixed, as one compiled program."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax import conditions
from composer_jax.diffusion import solvers
from composer_jax.diffusion.guidance import Plan, Use, as_uses, bucket, build_plan, mix
from composer_jax.diffusion.process import Process
from composer_jax.models.clip import Clip
from composer_jax.storage.models import Model, load_model


class Pipeline:
    """A model ready to sample. `names`: its conditions, in order; `size`: of its images.

    Calls with the same count, steps, solver and number of guidance rows share one compilation,
    whatever the conditions and how they are used.
    """

    def __init__(self, model: Model):
        self.model = model
        self.names: tuple[str, ...] = model.composer.config.conditions
        self.process = Process.from_dict(model.info["process"])
        self.size: int = model.info["image_size"]
        self.defaults = {"steps": 20, "guidance": 3.0, "solver": "dpmpp2m", **model.info["sampler"]}
        graph, state = nnx.split((model.composer, model.vae))
        self._state = state
        self._program = jax.jit(
            partial(_program, graph, self.process),
            static_argnames=("side", "solver", "steps", "noisy"),
        )

    @classmethod
    def load(cls, where: str | Path | None = None, dtype=jnp.float32) -> Pipeline:
        """Opens a model directory or training workdir; without `where` the bundled model."""
        return cls(load_model(where, dtype))

    def with_weights(self, model: Model) -> Pipeline:
        """The same pipeline for other weights of the same architecture; nothing is recompiled."""
        other = copy.copy(self)
        other.model = model
        _, other._state = nnx.split((model.composer, model.vae))
        return other

    @cached_property
    def clip(self) -> Clip:
        """The model's CLIP, opened when first needed."""
        return Clip.load(self.model.clip, **self.model.info.get("clip_text", {}))

    def tool(self, name: str) -> Any:
        """The tool that a condition's `extract`, `parse` and `measure` want, or None."""
        return self.clip if conditions.get(name).tool == "clip" else None

    def __call__(
        self,
        given: Mapping[str, Any],
        *,
        count: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        eta: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> np.ndarray:
        """Images uint8 [count, H, W, 3] that obey `given`.

        `given`: condition -> a value, a `use(...)` of one, or a list of uses. A value is what
        `decompose` returns or what the condition's `parse` reads. Image i depends on `seed` and i
        alone. `guidance`: classifier-free guidance weight, 1 for none, in effect inside `interval`
        (0 to 1 in process time). `eta`: noise of solver "ddim". Raises ValueError, one line, for
        what a condition or the plan cannot take.
        """
        uses = {name: self._uses(name, value) for name, value in given.items()}
        stored = {name: [u.value for u in candidates] for name, candidates in uses.items()}
        return self.sample(
            uses,
            [stored] * count,
            seeds=[(seed, i) for i in range(count)],
            steps=steps,
            guidance=guidance,
            solver=solver,
            eta=eta,
            interval=interval,
        )

    def sample(
        self,
        uses: Mapping[str, Sequence[Use]],
        stored: Sequence[Mapping[str, Sequence[Any]]],
        *,
        seeds: Sequence[tuple[int, int]],
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        eta: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> np.ndarray:
        """One image for each entry of `stored`, used as `uses` says; uint8 [B, H, W, 3].

        `stored[b][name]`: the stored values of condition `name` for image b, one for each of
        `uses[name]`. `seeds[b]`: (seed, index), which the image's noise is drawn from.
        """
        if not stored:
            raise ValueError("count must be at least 1")
        steps = self.defaults["steps"] if steps is None else steps
        guidance = self.defaults["guidance"] if guidance is None else guidance
        solver = self.defaults["solver"] if solver is None else solver
        latent = self.size // self.model.vae.factor
        times = solvers.evaluation_times(self.process.times(steps), solver)
        size = (latent, latent)  # always, so that a region more or less never recompiles
        plan = _trim(
            build_plan(uses, self.names, times, guidance=guidance, interval=interval, size=size)
        )
        keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(
            *(jnp.asarray([pair[j] for pair in seeds], jnp.uint32) for j in (0, 1))
        )
        images = self._program(
            self._state,
            self._rows(plan, stored),
            jnp.asarray(plan.strength),
            jnp.asarray(plan.weight),
            keys,
            jnp.float32(eta),
            side=latent,
            solver=solver,
            steps=steps,
            noisy=bool(eta),
        )
        return np.asarray(images)

    def _uses(self, name: str, value: Any) -> list[Use]:
        if name not in self.names:
            conditions.get(name)  # a name that nobody knows gets the better message
            raise ValueError(f"this model has no {name}; it has {', '.join(self.names)}")
        return [replace(one, value=self.stored(name, one.value)) for one in as_uses(value)]

    def stored(self, name: str, value: Any) -> Any:
        """What a person hands in, or stored already, as stored at this model's size."""
        condition = conditions.get(name)
        if not isinstance(value, Mapping):
            value = condition.parse(value, self.tool(name))
        return condition.fit(value, (self.size, self.size))

    def _rows(self, plan: Plan, stored: Sequence[Mapping[str, Sequence[Any]]]) -> dict:
        """Values [K B, ...] of every condition for every row and image; blanks where absent."""
        config = self.model.composer.config
        values: dict[str, dict[str, np.ndarray]] = {}
        for column, name in enumerate(self.names):
            shapes = {
                part: (self.size, self.size, *p.shape) if p.kind == "spatial" else p.shape
                for part, p in config.parts(name).items()
            }
            values[name] = {
                part: np.zeros((len(plan.source), len(stored), *shape), np.float32)
                for part, shape in shapes.items()
            }
            to_value = conditions.get(name).value
            made: dict[int, dict] = {}  # images that share a value share its making
            for k, number in enumerate(plan.source[:, column]):
                for b, one in enumerate(stored if number else ()):
                    source = one[name][number - 1]
                    if id(source) not in made:
                        made[id(source)] = to_value(source)
                    for part, array in made[id(source)].items():
                        values[name][part][k, b] = array
        return jax.tree.map(lambda a: jnp.asarray(a.reshape(-1, *a.shape[2:])), values)


def _program(
    graph,
    process: Process,
    state,
    values,
    strength,
    weight,
    keys,
    eta,
    *,
    side,
    solver,
    steps,
    noisy,
):
    """Encodes conditions once, solves, decodes. Compiled for K, B, solver and steps."""
    composer, vae = nnx.merge(graph, state)
    rows, batch = strength.shape[1], keys.shape[0]
    encoded, absent = composer.encode(values), composer.encode_absent()
    shape = (side, side, composer.config.latent_channels)
    x_T = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def evaluate(x, t, index):
        x_rows = jnp.tile(x, (rows, 1, 1, 1))
        timesteps = jnp.full(rows * batch, process.timestep(t))
        row_strength = jnp.repeat(strength[index], batch, axis=0)
        output = composer(x_rows, timesteps, encoded, absent, row_strength)
        return mix(output.reshape(rows, batch, *x.shape[1:]), weight[index])

    x0 = solvers.sample(
        evaluate,
        x_T,
        process.times(steps),
        process,
        solver,
        key=jax.vmap(jax.random.fold_in, (0, None))(keys, 1) if noisy else None,
        eta=eta if noisy else 0.0,
    )
    images = vae.decode(x0)
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def _trim(plan: Plan) -> Plan:
    """The plan without rows that never have weight, padded to the next bucket."""
    rows = np.flatnonzero(np.any(plan.weight != 0.0, axis=(0, 2, 3)))
    spare = np.flatnonzero(np.all(plan.weight == 0.0, axis=(0, 2, 3)))
    keep = np.concatenate([rows, spare])[: bucket(len(rows))]
    return Plan(plan.source[keep], plan.strength[:, keep], plan.weight[:, keep])
