"""The loop: mesh, state, checkpoint, steps. It trains whatever has a loss, on any `batch(step)`."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from composer_jax.storage.checkpoints import Checkpoints
from composer_jax.training.sharding import batch_sharding, make_mesh, shard_tree
from composer_jax.training.state import TrainState, create_state
from composer_jax.training.step import Loss, train_step

# bf16 FLOP/s of one device, without sparsity, by the start of jax's device_kind
PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


@dataclass(frozen=True)
class Settings:
    """How to train; intervals in steps, `batch` over all processes."""

    steps: int
    batch: int
    seed: int
    ema: float
    log_every: int
    save_every: int
    hook_every: int
    mesh: dict
    sharding: Sequence[tuple[str, str]]


Hook = Callable[[int, TrainState], None]


def train(
    init: Callable[[], dict],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch: Callable[[int], dict],
    settings: Settings,
    workdir: Path,
    hooks: Sequence[Hook] = (),
    on_save: Hook | None = None,
    warm: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """Trains from the newest checkpoint in `workdir`, or from `init()`, to `settings.steps`.

    `init()` gives parameters; `batch(step)` this process's part of a batch, numpy arrays;
    `hooks` are called every `hook_every` steps and at the end, `on_save` beside each checkpoint;
    `warm` puts trained weights into a new state.
    SIGTERM and Ctrl-C save and raise `Interrupted`. Writes metrics.jsonl and TensorBoard events.
    Raises FloatingPointError, naming the step, where the loss is not finite; the last checkpoint
    stays.
    """
    mesh = make_mesh(**settings.mesh)
    create = lambda: create_state(init(), optimizer)  # noqa: E731
    shapes = jax.eval_shape(create)
    shardings = shard_tree(shapes, mesh, settings.sharding)
    checkpoints = Checkpoints(workdir / "checkpoints")
    start = checkpoints.latest() or 0
    if start:
        abstract = jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings
        )
        state = checkpoints.restore(abstract)
    else:
        state = jax.jit(create, out_shardings=shardings)()
        state = warm(state) if warm else state

    to_device = partial(_to_device, sharding=batch_sharding(mesh))
    step_fn = partial(train_step, loss=loss, optimizer=optimizer, ema_decay=settings.ema)
    seed = jnp.uint32(settings.seed)
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
    log = _Log(workdir, start, settings.steps, settings.batch)
    try:
        with _Stop() as stop:
            upcoming = to_device(batch(start)) if start < settings.steps else None
            compiled = jitted.lower(state, upcoming, seed).compile() if upcoming else None
            log.flops = _flops(compiled)
            for step in range(start, settings.steps):
                state, metrics = compiled(state, upcoming, seed)
                done = step + 1
                log.add(done, metrics)
                if done < settings.steps:  # the host makes the next batch while the device works
                    upcoming = to_device(batch(done))
                last = done == settings.steps
                if last or done % settings.log_every == 0 or stop.asked:
                    log.write()
                if last or done % settings.save_every == 0 or stop.asked:
                    log.write()
                    checkpoints.save(done, state)
                    if on_save:
                        on_save(done, state)
                if stop.asked and not last:
                    raise Interrupted(done, stop.asked)
                if settings.hook_every and (last or done % settings.hook_every == 0):
                    for hook in hooks:
                        hook(done, state)
    finally:
        checkpoints.close()
        log.close()
    return state


class Interrupted(Exception):
    """Training was asked to stop; the checkpoint of `step` is on disk."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, saved at step {step}")
        self.step, self.signal = step, signal_number


class _Stop:
    """Notes SIGTERM and SIGINT instead of dying; a second SIGINT interrupts as usual."""

    asked: int | None = None

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        del frame
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _to_device(tree, sharding):
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def _flops(compiled) -> float:
    cost = compiled.cost_analysis() if compiled else None
    return float((cost or {}).get("flops", 0.0))


class _Log:
    """metrics.jsonl, TensorBoard and the progress bar; scalars stay on the device until written."""

    def __init__(self, workdir: Path, start: int, steps: int, batch: int):
        self._main = jax.process_index() == 0
        self._path, self._batch, self.flops = workdir / "metrics.jsonl", batch, 0.0
        self._waiting: list[tuple[int, dict]] = []
        self._bar = tqdm(
            total=steps, initial=start, unit="step", disable=not self._main, smoothing=0.05
        )
        if self._main:
            from tensorboardX import SummaryWriter

            _cut_back(self._path, start)
            self._board = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start + 1 if start else None
            )
        self._since = None
        self._peak = next(
            (f for k, f in PEAK_FLOPS.items() if jax.devices()[0].device_kind.startswith(k)), None
        )

    def add(self, step: int, metrics: dict) -> None:
        self._since = self._since or time.perf_counter()
        self._waiting.append((step, metrics))
        self._bar.update()

    def write(self) -> None:
        if not self._waiting:
            return
        rows = [(step, {k: float(v) for k, v in m.items()}) for step, m in self._waiting]
        for step, row in rows:
            if not np.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss is {row['loss']} at step {step}; the last checkpoint is kept"
                )
        seconds = time.perf_counter() - self._since
        rate = self._batch * len(rows) / seconds
        mean = {k: float(np.mean([row[k] for _, row in rows])) for k in rows[0][1]}
        shown = {"loss": f"{mean['loss']:.4f}", "images/s": f"{rate:.0f}"}
        if self._peak and self.flops:
            # the compiled program is one device's
            mean["mfu"] = self.flops * len(rows) / seconds / self._peak
            shown["mfu"] = f"{mean['mfu']:.1%}"
        self._bar.set_postfix(shown)
        if self._main:
            step = rows[-1][0]
            line = {"step": step, **mean, "images_per_second": rate}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                self._board.add_scalar(name, value, step)
        self._waiting, self._since = [], time.perf_counter()

    def close(self) -> None:
        self._bar.close()
        if self._main:
            self._board.close()


def _cut_back(path: Path, step: int) -> None:
    """Drops the lines that a restored run will write again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # a line half-written when the run died
            continue
    path.write_text("".join(kept))
