"""The loop: mesh, state, checkpoint, steps. It trains whatever has a loss, on any `batch(step)`."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from composer_jax.data.order import ORDER
from composer_jax.models.files import dotted
from composer_jax.storage.checkpoints import Checkpoints
from composer_jax.training.cluster import Stop, leave
from composer_jax.training.hardware import compiler_options, step_flops
from composer_jax.training.kept import compile_step
from composer_jax.training.log import Log, NonFinite
from composer_jax.training.sharding import make_mesh, shard_tree, to_devices
from composer_jax.training.state import TrainState, abstract_state, start_state
from composer_jax.training.step import Loss, jit_step
from composer_jax.utils.atomic import new_file
from composer_jax.utils.seeds import seed_words

log = logging.getLogger("composer_jax")


@dataclass(frozen=True)
class Settings:
    """How to train; intervals in steps, `batch` over all processes.

    `dtype`: that of computation. `ema`: decay of the exported average; `lengths`: relative lengths
    of power-function averages. `profile`: () or the steps between which a profile is recorded, for
    TensorBoard.
    """

    steps: int
    batch: int
    seed: int
    ema: float
    log_every: int
    save_every: int
    mesh: dict
    sharding: Sequence[tuple[str, str]]
    dtype: str = "float32"
    lengths: Sequence[float] = ()
    accumulate: int = 1
    profile: Sequence[int] = ()

    def __post_init__(self):
        ways, profile = self.accumulate, tuple(self.profile)
        if ways < 1 or self.batch % ways:
            raise ValueError(f"accumulate {ways}: it must divide the batch of {self.batch}")
        if profile and not (len(profile) == 2 and 0 < profile[0] < profile[1]):
            raise ValueError(f"profile_steps {profile}: a first and a later last step are wanted")


# of a step and the state after it; may return scalars for the log. Every process calls it.
Hook = Callable[[int, TrainState], Mapping[str, float] | None]


def train(
    params: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch: Callable[[int], dict],
    settings: Settings,
    workdir: Path,
    hooks: Sequence[tuple[int, Hook]] = (),
    on_save: Hook | None = None,
    about: Any = None,
    begin: Callable[[], None] = lambda: None,
) -> TrainState:
    """Trains from the newest whole checkpoint in `workdir`, or from `params`, to `settings.steps`.

    `params`: a tree of arrays, or of `Tensor`s, which a new run alone reads; `batch(step)`: this
    process's part of a batch, numpy arrays. `hooks`: (every so many steps, hook) pairs, called at
    the end, too; `on_save` is called beside each checkpoint, and of a run that has come to its end
    already; `about`: as `compile_step` takes it; `begin` is called before the first step, once all
    is checked and compiled. SIGTERM and Ctrl-C save and raise `Interrupted`. Writes metrics.jsonl
    and TensorBoard events.
    Raises FloatingPointError, naming the step, where loss or gradient are not finite: the batch is
    in nonfinite-STEP-PROCESS.npz and the last checkpoint stays. Raises OSError where the last one
    could not be written. Ends the process where others of the job are gone.
    """
    profile = _Profile(settings.profile, workdir / "tensorboard")
    mesh = make_mesh(**settings.mesh)
    shapes = abstract_state(params, optimizer, settings.lengths)
    shardings = shard_tree(shapes, mesh, settings.sharding)
    checkpoints = Checkpoints(workdir / "checkpoints")
    start, state, notes = checkpoints.restore(
        jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings
        )
    )
    if start > settings.steps:
        checkpoints.close()
        raise ValueError(
            f"steps is {settings.steps}, and {workdir} has been trained for {start} steps: ask for "
            f"as many or more, or for another folder"
        )
    if start:
        log.info("going on from step %d", start)
    else:
        state = start_state(params, optimizer, settings.lengths, shardings)
    del params

    jitted = jit_step(shardings, loss, optimizer, settings.ema, settings.accumulate, settings.dtype)
    seed = seed_words(settings.seed)
    order = notes.get("order", 1) if start else ORDER  # what `batch` goes by: see tasks.py
    told = Log(workdir, start, settings.steps, settings.batch, notes.get("waiting", ()))
    try:
        with _failures_explained(batch, workdir), Stop() as stop:
            upcoming = to_devices(batch(start), mesh) if start < settings.steps else None
            if upcoming:
                device = mesh.devices.flat[0]
                options = compiler_options(device)
                with jax.set_mesh(mesh):  # by which kernels are split over devices
                    step_of, compiled = compile_step(jitted, state, upcoming, seed, options, about)
                told.flops = step_flops(compiled, device)
            elif on_save:  # it may have been killed beside its last checkpoint
                on_save(start, state)
            begin()
            for step in range(start, settings.steps):
                profile.at(step, state)
                state, metrics = step_of(state, upcoming, seed)
                done = step + 1
                told.add(done, metrics)
                if done < settings.steps:  # the host makes the next batch while the device works
                    upcoming = to_devices(batch(done), mesh)
                asked, last = stop.asked(done), done == settings.steps
                if last or done % settings.log_every == 0:
                    told.write()
                for every, hook in hooks if not asked else ():  # who asks does not wait for long
                    if last or done % every == 0:
                        with told.away():
                            told.scalars(done, hook(done, state) or {})
                if last or done % settings.save_every == 0 or asked:
                    checkpoints.save(done, state, {"waiting": told.waiting(), "order": order})
                    if on_save:
                        on_save(done, state)
                if asked and not last:
                    raise Interrupted(done, asked)
    finally:
        profile.stop(state)
        told.close()
        checkpoints.close()
    return state


@contextmanager
def _failures_explained(batch: Callable[[int], dict], workdir: Path) -> Iterator[None]:
    """Keeps the batch of a loss that is not finite; leaves a job whose other processes are gone."""
    try:
        yield
    except NonFinite as error:
        path = workdir / f"nonfinite-{error.step}-{jax.process_index()}.npz"
        flat, _ = jax.tree_util.tree_flatten_with_path(batch(error.step - 1))
        with new_file(path) as new, new.open("wb") as file:
            np.savez(file, **{dotted(name): array for name, array in flat})
        raise FloatingPointError(f"{error}; the batch is in {path}") from error
    except RuntimeError as error:  # of XLA's collectives
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().splitlines()[0][:200]
        what = "is out of memory" if "RESOURCE_EXHAUSTED" in reason else "has lost another"
        leave(f"a process of this job {what} ({reason}); what was saved is kept for its next start")


class Interrupted(Exception):
    """Training was asked to stop; the checkpoint of `step` is on disk."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, saved at step {step}")
        self.step, self.signal = step, signal_number


class _Profile:
    """A window of steps that jax's profiler records."""

    def __init__(self, window: Sequence[int], folder: Path):
        safe = jax.config.jax_platforms or jax.default_backend() == "tpu"
        if window and not safe and importlib.util.find_spec("libtpu"):
            raise ValueError(
                "profile_steps: libtpu is installed and there is no TPU; its profiler would end "
                "this process. Set JAX_PLATFORMS=cpu (or cuda), or uninstall libtpu"
            )
        self._window, self._folder, self._on = tuple(window), folder, False

    def at(self, step: int, state) -> None:
        if not self._window:
            return
        if step == self._window[0]:
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif step == self._window[1]:
            self.stop(state)

    def stop(self, state) -> None:
        if self._on:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._on = False
