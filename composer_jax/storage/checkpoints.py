"""Checkpoints of a training run: asynchronous, atomic, restored onto any sharding."""

from __future__ import annotations

import logging
from pathlib import Path

import orbax.checkpoint as ocp

for _noisy in ("orbax", "absl"):  # its progress lines are not for the user; warnings are
    logging.getLogger(_noisy).setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints under one folder; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, state) -> None:
        """Starts to write `state` (a pytree of arrays) as the checkpoint of `step`."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, abstract):
        """The newest checkpoint in the shapes and shardings of `abstract`.

        `abstract`: a pytree of jax.ShapeDtypeStruct. Raises ValueError, naming the first
        difference, where the checkpoint is of another model.
        """
        step = self.latest()
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"checkpoint {step} is of another model: {reason}") from error

    def close(self) -> None:
        """Waits until all is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
