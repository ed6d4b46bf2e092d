"""A checkpoint that cannot be written is said in one line, and nothing goes on waiting for it."""

import errno
import os
import threading
import time
from concurrent.futures.thread import _threads_queues

import jax.numpy as jnp
import pytest

from composer_jax.storage.checkpoints import Checkpoints


def others():
    """Threads that the end of the process waits for, and that nothing ends before."""
    return {one for one in threading.enumerate() if not one.daemon} - set(_threads_queues)


@pytest.mark.parametrize("folder", ["4.orbax-checkpoint-tmp", "state.orbax-checkpoint-tmp"])
def test_a_folder_that_cannot_be_made_leaves_no_thread_that_waits(tmp_path, monkeypatch, folder):
    mkdir, before = os.mkdir, others()

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
    end = time.monotonic() + 20
    while (left := others() - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
