"""`composer train --config NAME[:variant] --workdir DIR`: trains what a config says; resumes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from composer_jax import conditions
from composer_jax.commands import arguments
from composer_jax.commands.arguments import take_rest  # noqa: F401 (the cli calls it)
from composer_jax.commands.unused import tell_keys
from composer_jax.data.stream import folders_of
from composer_jax.diffusion import Use
from composer_jax.evaluation.pictures import grid
from composer_jax.training.cluster import gather, is_main, join, main_first, share
from composer_jax.training.config import check_kept, flat, keep_config, load_config
from composer_jax.training.ema import snapshot_path, write_snapshot
from composer_jax.training.held_out import held_out_loss
from composer_jax.training.loop import Interrupted, Settings
from composer_jax.training.loop import train as run_loop
from composer_jax.training.optimizer import make_optimizer
from composer_jax.training.schema import check_together, check_values
from composer_jax.training.sharding import make_mesh
from composer_jax.training.step import only
from composer_jax.training.tasks import Task, make_task, open_data, pools_folder
from composer_jax.utils.atomic import check_writable
from composer_jax.utils.owned import adopt, check_not_read, record
from composer_jax.utils.png import save_png
from composer_jax.utils.precision import matmul_precision

log = logging.getLogger("composer_jax")

SHOWN = 8  # examples in a sample grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `--config.KEY=VALUE` is taken by `take_rest`."""
    parser.add_argument(
        "--config", required=True, type=arguments.text, help="NAME[:variant] or FILE.py[:variant]"
    )
    parser.add_argument(
        "--workdir", required=True, type=arguments.folder, help="run folder; resumes there"
    )
    parser.epilog = "--config.KEY=VALUE sets a key of the config, for example --config.steps=100"


def run(args: argparse.Namespace) -> int:
    """Trains to the config's last step, from the newest checkpoint where there is one."""
    join()
    config = load_config(args.config, args.overrides)
    if is_main():
        tell_keys(config, args.overrides)
    made = [one for one in (args.workdir, *args.workdir.parents) if not one.exists()]
    kept = args.workdir / "config.json"
    claimed = kept.exists()
    try:
        train(config, args.workdir)
    except Interrupted as stopped:
        if is_main():
            print(f"{stopped}; the same command goes on from there")
        return 0 if stopped.signal == signal.SIGTERM else 130
    except ValueError:
        # nothing half-written where nothing was; once training has begun, all of it stays
        begun = [*args.workdir.glob("checkpoints/[0-9]*"), *args.workdir.glob("metrics.jsonl")]
        if is_main() and made and not begun:
            shutil.rmtree(args.workdir, ignore_errors=True)  # which this call has made
            with contextlib.suppress(OSError):
                for one in made[1:]:
                    one.rmdir()
        if is_main() and not claimed and not begun:
            kept.unlink(missing_ok=True)
        raise
    if is_main():
        print(f"trained {config.steps} steps; the model is in {args.workdir / 'model'}")
    return 0


def train(config: ConfigDict, workdir: Path) -> Task:
    """Trains what `config` says in `workdir` and exports the model beside each checkpoint.

    The config is kept in `workdir` once everything is checked, and binds the runs after it once
    there is a checkpoint. Raises ValueError for a config that cannot be run, `Interrupted` after a
    signal.
    """
    check_values(flat(config))
    check_together(config)
    for source in (config.source, config.held_out):
        for place in filter(None, (workdir, config.pools)):
            check_not_read(place, folders_of(source))
    check_writable(workdir)
    with matmul_precision(config.get("precision")):
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> Task:
    source = open_data(config.source, config)
    if config.held_out:  # one that is not there is said before the other is taken apart
        open_data(config.held_out, config, split="test")
    settings = Settings(
        steps=config.steps,
        batch=config.batch,
        seed=config.seed,
        ema=config.ema,
        log_every=config.log_every,
        save_every=config.save_every,
        mesh=config.mesh.to_dict(),
        sharding=tuple(config.sharding),
        dtype=config.dtype,
        lengths=tuple(config.ema_lengths),
        accumulate=config.accumulate,
        profile=tuple(config.profile_steps),
    )
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)
    share(make_mesh(**config.mesh), config.batch)  # what cannot be split is said before all else
    pools_folder(config, workdir)
    if config.optimizer.warmup >= config.steps and is_main():
        log.info("the learning rate still rises at the end: optimizer.warmup is %d of %d steps",
                 config.optimizer.warmup, config.steps)  # fmt: skip
    begun = any((workdir / "checkpoints").glob("[0-9]*")) or (workdir / "model").exists()
    with main_first():
        if is_main():
            check_kept(config, workdir, begun)
            check_writable(workdir)
        task = make_task(config, source, workdir)
    loss, optimizer = only(config.trainable, task.loss, optimizer)

    def export(step, state):
        params = gather(state.ema)
        if is_main():
            task.export(params, step)

    hooks, data = [], task.data
    if data.held_out:
        hook = held_out_loss(
            task.loss,
            data.held_out,
            data.held_out_count,
            config.batch,
            share(make_mesh(**config.mesh), config.batch),
            config.seed,
            config.dtype,
            config.accumulate,
        )
        hooks.append((config.held_out_every, hook))
    if config.ema_lengths:
        hooks.append((config.snapshot_every, _snapshots(task, workdir)))
    if config.sample_every and config.task in ("codec", "composer"):
        draw = _grids(task, workdir)

        def sample(step, state):
            export(step, state)
            if is_main():
                draw(step)

        hooks.append((config.sample_every, sample))

    def begin():
        if is_main():
            keep_config(config, workdir, begun)
            adopt(workdir / "model")

    about = [config.to_dict(), task.about]
    run_loop(
        task.params, loss, optimizer, data.batch, settings, workdir, hooks, export, about, begin
    )
    return task


def _snapshots(task: Task, workdir: Path):
    """A hook that keeps the averages by power functions, for `composer ema`."""

    def hook(step, state) -> None:
        for length, average in state.averages.items():
            params = gather(average)
            if is_main():
                path = snapshot_path(workdir, step, float(length))
                write_snapshot(path, task.tensors(params))

    return hook


def _grids(task: Task, workdir: Path):
    """Of a step: writes `samples/STEP.png`, for the composer a row for each condition alone."""
    pipelines: list = []
    count = min(SHOWN, len(task.data.shown["image"]))

    def composer_grid() -> np.ndarray:
        from composer_jax.sampling.pipeline import Pipeline
        from composer_jax.storage.models import load_model

        if pipelines:
            pipelines[0] = pipelines[0].with_weights(load_model(workdir))
        else:
            pipelines.append(Pipeline.load(workdir))
        pipe = pipelines[0]
        rows = [task.data.shown["image"][:count]]
        for name in (*pipe.names, None):
            if name is not None and not conditions.get(name).cached:
                continue
            stored = task.data.shown["stored"]
            shown = [
                {name: [jax.tree.map(lambda a, i=i: np.array(a[i]), stored[name])]} if name else {}
                for i in range(count)
            ]
            uses = {name: [Use(None)]} if name else {}
            rows.append(pipe.sample(uses, shown, seeds=[(0, i) for i in range(count)]))
        return grid(np.concatenate(rows), count)

    def codec_grid() -> np.ndarray:
        from composer_jax.storage.models import load_codec

        images = np.array(task.data.shown["image"][:count])
        vae = load_codec(workdir)
        decoded = vae.decode(vae.latents(vae.encode(images.astype(np.float32) / 127.5 - 1.0)))
        decoded = np.round((np.clip(decoded, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
        return grid(np.concatenate([images, decoded]), count)

    def draw(step: int) -> None:
        picture = composer_grid() if (workdir / "model" / "model.json").is_file() else codec_grid()
        path = workdir / "samples" / f"{step:08d}.png"
        save_png(path, picture)
        record(workdir, [path])

    return draw
