"""A checkpoint that cannot be written is said in one line, and nothing goes on waiting for it."""

import errno
import os
import threading
from concurrent.futures.thread import _threads_queues

import jax.numpy as jnp
import pytest

from composer_jax.storage.checkpoints import Checkpoints


@pytest.mark.parametrize("folder", ["4.orbax-checkpoint-tmp", "state.orbax-checkpoint-tmp"])
def test_a_folder_that_cannot_be_made_leaves_no_thread_that_waits(tmp_path, monkeypatch, folder):
    mkdir, before = os.mkdir, set(threading.enumerate())

    def full(path, *args, **options):
        if str(path).endswith(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *args, **options)

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    monkeypatch.setattr(os, "mkdir", full)
    checkpoints.save(4, {"kernel": jnp.zeros(3)}, {})
    with pytest.raises(OSError, match=r"checkpoints cannot be written: No space left"):
        checkpoints.close()
    assert not list((tmp_path / "checkpoints").iterdir())
    for one in (
        set(threading.enumerate()) - before - set(_threads_queues)
    ):  # pools end by themselves
        one.join(20)
        assert one.daemon or not one.is_alive()
