"""Checkpoints of a training run: asynchronous, atomic, restored onto any sharding."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from composer_jax.utils.atomic import WriteError, writing

log = logging.getLogger("composer_jax")
for _noisy in ("orbax", "absl", "asyncio"):  # what they say of errors is said below, in a line
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)

STATE, NOTES, DIGEST = "state", "notes", "digest"
UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a checkpoint that is being written


class Checkpoints:
    """The checkpoints under one folder; the newest `keep` stay.

    Each holds a pytree of arrays, their digest, and notes, which are of JSON's types.
    """

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            # else a folder that cannot be made leaves threads that wait for it for 20 minutes
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._folder, self._options = folder.resolve(), options
        if jax.process_index() == 0:
            _drop_damaged_metadata(self._folder)
        with writing(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._failed: str | None = None

    def save(self, step: int, state, notes: dict) -> None:
        """Starts to write the checkpoint of `step`, when the one before is on disk.

        What cannot be written is logged, and the older checkpoints stay; see `close`.
        """
        self._finish()
        if step in self._manager.all_steps():
            return
        known = ocp.args.JsonSave({**notes, DIGEST: digest(state)})
        args = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), NOTES: known})
        try:
            self._manager.save(step, args=args)
        except Exception as error:  # by tensorstore, orbax or the system
            self._fail(error)

    def _finish(self) -> None:
        self._failed = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        reason = WriteError(self._folder, OSError(_refusal(error)))  # while the disk is full
        self._remove_unfinished()
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)
        self._failed = f"{reason}; {self._newest()}"
        log.error("%s", self._failed)

    def _remove_unfinished(self) -> None:
        """Makes room: a disk that is full stays full with half a checkpoint."""
        if jax.process_index() == 0:
            for left in self._folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(left, ignore_errors=True)

    def _newest(self) -> str:
        step = self._manager.latest_step()
        return f"the newest whole one is of step {step}" if step else "there is no older one"

    def restore(self, abstract) -> tuple[int, Any, dict]:
        """Step, state and notes of the newest checkpoint that is whole; step 0 for none.

        `abstract`: a pytree of jax.ShapeDtypeStruct with the shardings that are wanted. One that
        cannot be read, or whose numbers are not those that were written, is named in the log and
        set aside as STEP.broken. Raises ValueError where none can be read, as of another model.
        """
        broken: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, notes = self._read(step, abstract)
            except Exception as error:  # by tensorstore, orbax, json or the system
                broken[step] = _reason(error)
                continue
            for other, reason in broken.items():
                log.warning("checkpoint %d is set aside: %s", other, reason)
                if jax.process_index() == 0:
                    aside = self._folder / f"{other}.broken"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self._folder / str(other)).rename(aside)
            multihost_utils.sync_global_devices("set aside")
            self._manager.reload()
            return step, state, notes
        if broken:
            step, reason = next(iter(broken.items()))
            raise ValueError(f"checkpoint {step} is of another model, or broken: {reason}")
        return 0, None, {}

    def _read(self, step: int, abstract) -> tuple[Any, dict]:
        """State and notes, or the same failure in every process.

        Each reads its own part without waiting for the others, who may have no damage in theirs.
        """
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")
        options = {"multiprocessing_options": alone}
        handlers = {
            STATE: ocp.StandardCheckpointHandler(**options),
            NOTES: ocp.JsonCheckpointHandler(**options),
        }
        args = {STATE: ocp.args.StandardRestore(abstract), NOTES: ocp.args.JsonRestore()}
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers), **options)
        failure = None
        try:
            found = reader.restore(self._folder / str(step), ocp.args.Composite(**args))
        except Exception as error:  # by tensorstore, orbax, json or the system
            failure = error
        if not np.all(multihost_utils.process_allgather(failure is None)):
            raise failure or ValueError("another process cannot read its part")
        state, notes = found[STATE], dict(found[NOTES])
        if notes.pop(DIGEST) != digest(state):
            raise ValueError("its numbers are not those that were written")
        return state, notes

    def close(self) -> None:
        """Waits until all is on disk; raises OSError where the last save failed."""
        failed = self._failed
        self._finish()
        self._manager.close()
        if failed := self._failed or failed:
            self._remove_unfinished()  # what was still being written when it failed
            raise OSError(failed)


def _drop_damaged_metadata(folder: Path) -> None:
    """Removes orbax's own metadata where it is JSON and no object: orbax goes on without it, or
    with other damage, but raises at that."""
    for path in folder.glob("[0-9]*/_CHECKPOINT_METADATA"):
        with contextlib.suppress(OSError, ValueError):
            if not isinstance(json.loads(path.read_bytes()), dict):
                log.warning("%s is damaged and removed", path)
                path.unlink()


def newest_notes(folder: Path) -> dict | None:
    """The newest notes that can be read, of the checkpoints under `folder`; None without any."""
    steps = [path for path in folder.glob("*") if path.name.isdigit()]
    for step in sorted(steps, key=lambda path: int(path.name), reverse=True):
        try:
            return dict(json.loads((step / NOTES / "metadata").read_text()))
        except (OSError, ValueError, TypeError):  # damaged: `restore` goes by an older one, too
            continue
    return None


def digest(tree) -> list[int]:
    """A sum over the bits of each array of a tree, the same for every sharding."""
    leaves = jax.tree.leaves(tree)
    mesh = getattr(leaves[0].sharding, "mesh", None)
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
    # a program for each shape: one for the whole state would have as many kernels as arrays
    summed = jax.jit(_bits, out_shardings=everywhere)
    return [int(total) for total in jax.device_get([summed(leaf) for leaf in leaves])]


def _bits(leaf: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(leaf, unsigned), dtype=jnp.uint32)


def _refusal(error: Exception) -> str:
    """What the system said in an error of tensorstore or orbax, else the error's first line."""
    known = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO))
    return next((text for text in known if text in str(error)), None) or _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, LookupError | TypeError | AttributeError):  # of a wrong value in a file
        return f"it is damaged, {error!r}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". See")[0][:200]
