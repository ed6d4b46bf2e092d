"""What norms by exact variance cost beside E[x^2] - E[x]^2, flax's default, in one run.

    python benchmarks/norms.py                      on this machine: scenes64's UNet, float32
    JAX_PLATFORMS=cpu python benchmarks/norms.py --gpu    the H100's program, see gpu_program.py

On this machine both ways take turns, forward and with the gradient; medians of the times and of the
ratios within a turn. Of the H100's program: its temporaries and how many kernels it has.
Results: benchmarks/RESULTS.md.
"""

import argparse
import re
import statistics
import time

import gpu_program
import jax
import jax.numpy as jnp
from flax import nnx
from training import shape_of

from composer_jax.models import blocks
from composer_jax.models.initializers import abstract
from composer_jax.models.unet import UNet

WAYS = {"E[x^2] - E[x]^2": True, "exact": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--gpu", action="store_true", help="compile the H100's program instead")
    args = parser.parse_args()
    if args.gpu:
        compile_for_gpu()
    else:
        take_turns(args.batch, args.turns)


def take_turns(batch: int, turns: int) -> None:
    config, side, tokens = shape_of("scenes64")
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, side, side, config.in_channels))
    context = jax.random.normal(keys[1], (batch, tokens, config.cross_attention_dim))
    t = jnp.linspace(0.0, 999.0, batch)
    for what in ("forward", "gradient"):
        compiled = {name: program(config, what, x, t, context) for name in ways()}
        times = [{name: timed(run) for name, run in compiled.items()} for _ in range(turns)]
        medians = [1e3 * statistics.median(turn[name] for turn in times) for name in WAYS]
        ratios = [turn["exact"] / turn["E[x^2] - E[x]^2"] for turn in times]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{what}: {medians[0]:.0f} ms, exact {medians[1]:.0f} ms; ratio "
              f"{statistics.median(ratios):.3f} ({spread})")  # fmt: skip


def ways():
    """Yields each way's name while networks that are built get their norms so."""
    for name, blocks.NORM["use_fast_variance"] in WAYS.items():
        yield name


def program(config, what: str, x, t, context):
    """Compiles the UNet's forward pass or its gradient; returns a function that runs it once."""
    graph, params = nnx.split(abstract(UNet, config, dtype=jnp.float32))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02, leaf.dtype), params)

    def forward(params):
        return jnp.mean(nnx.merge(graph, params)(x, t, context) ** 2)

    chosen = forward if what == "forward" else jax.value_and_grad(forward)
    compiled = jax.jit(chosen).lower(params).compile()
    jax.block_until_ready(compiled(params))
    return lambda: jax.block_until_ready(compiled(params))


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compile_for_gpu() -> None:
    gpu_program.assume_hopper()
    device = gpu_program.described()
    args = argparse.Namespace(unet="sd15", steps=50, batch=1)
    for name in ways():
        compiled = gpu_program.lowered(args, device).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
        kernels = len(re.findall(r" fusion\(| custom-call\(", compiled.as_text()))
        print(f"{name}: temporaries {temporaries:.3f} GiB, {kernels} kernels")


if __name__ == "__main__":
    main()
