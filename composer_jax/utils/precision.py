"""How exactly float32 is multiplied: accelerators round factors unless they are told not to.

By default a float32 product is made of TF32 factors (10 bits of fraction) on NVIDIA GPUs, and in
one pass of bfloat16 (7 bits) on TPUs. "high" takes three passes there, "highest" keeps float32.
CPUs always do, and bfloat16 networks have no more to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PRECISIONS = ("default", "high", "highest")


@contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Products inside are made with that precision, in all threads.

    None and "default" leave what JAX is set to (JAX_DEFAULT_MATMUL_PRECISION). Raises ValueError
    for another name than PRECISIONS has.
    """
    if name is not None and name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}; allowed: {', '.join(PRECISIONS)}")
    if name in (None, "default"):
        yield
        return
    import jax

    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", name)
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def current_precision() -> str:
    """The precision that products are made with now, under JAX's name of it."""
    import jax

    return jax.config.jax_default_matmul_precision or "default"
