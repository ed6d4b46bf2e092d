"""TensorFlow for data alone: imported late, without a GPU, without its chatter."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


@cache
def tf() -> Any:
    """The module `tensorflow`, which takes no accelerator from JAX."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # which JAX sets
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it says at its start what it cannot do
    try:
        import tensorflow
    except ImportError as error:
        raise ValueError(f"caches, tar and tfds need TensorFlow: {error}") from error
    for kind in ("GPU", "TPU"):
        tensorflow.config.set_visible_devices([], kind)
    return tensorflow


@cache
def tfds() -> Any:
    """The module `tensorflow_datasets`."""
    tf()
    import tensorflow_datasets

    return tensorflow_datasets
