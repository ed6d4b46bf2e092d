"""A train step of scenes64's UNet against diffusers' in PyTorch, on the same weights, in one run.

    taskset -c 0 python benchmarks/training.py            one core
    python benchmarks/training.py --batch 64 --profile

Gradient of a mean squared error, and AdamW, in float32; the UNet as it is inside, folded latents of
8 x 8 x 80 in and 8 x 8 x 16 out, 128 and 224 wide, a context of 72 tokens. Both are warmed up, then
take turns; medians of times and of ratios within a turn. The first losses must agree, and so must
those after all steps, nearly. Needs the extra `parity`. Results: benchmarks/RESULTS.md.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace

from composer_jax.cli import HUGE_PAGES

SIDE, TOKENS, RATE = 8, 72, 1e-4
STEPS = 4  # of a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="where PyTorch's time and ours goes")
    args = parser.parse_args()
    import jax
    import numpy as np
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    shape = (args.batch, SIDE, SIDE)
    x, wanted = (rng.standard_normal((*shape, c), np.float32) for c in (80, 16))
    t = rng.uniform(0.0, 1000.0, args.batch).astype(np.float32)
    context = rng.standard_normal((args.batch, TOKENS, 128), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        theirs = their_step(folder, x, wanted, t, context)
        start = time.perf_counter()
        ours = our_step(folder, x, wanted, t, context)
        compiled = time.perf_counter() - start
    first = ours(), theirs()
    np.testing.assert_allclose(*first, rtol=1e-4)
    times = []
    for _ in range(args.turns):
        turn = []
        for step in (ours, theirs):
            start = time.perf_counter()
            losses = [step() for _ in range(STEPS)]
            turn.append((time.perf_counter() - start) / STEPS)
        times.append((*turn, losses[-1]))
    mine, peer = (1e3 * statistics.median(column) for column in list(zip(*times, strict=True))[:2])
    ratios = [a / b for a, b, _ in times]
    print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, batch "
          f"{args.batch}, float32; jax {jax.__version__}, torch {torch.__version__}\n"
          f"ours {mine:.0f} ms (compiled in {compiled:.0f} s), PyTorch {peer:.0f} ms; ratio "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); losses "
          f"{ours():.4f} and {theirs():.4f} after {1 + STEPS * args.turns} steps")  # fmt: skip
    if args.profile:
        profile(ours, theirs)


def their_step(folder: str, x, wanted, t, context):
    """Writes random weights to `folder`; returns a function that trains a step, of the loss."""
    import torch
    from diffusers import UNet2DConditionModel

    from composer_jax.models.layouts import unet_to_diffusers
    from composer_jax.models.unet import PRESETS

    config = replace(PRESETS["scenes64"], in_channels=80, out_channels=16, patch=1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(unet_to_diffusers(config))
    unet.save_pretrained(folder)
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), RATE, (0.9, 0.99), weight_decay=0.0)
    x, wanted = (torch.from_numpy(array.transpose(0, 3, 1, 2).copy()) for array in (x, wanted))
    t, context = torch.from_numpy(t), torch.from_numpy(context)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = ((unet(x, t, context).sample - wanted) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_step(folder: str, x, wanted, t, context):
    """The same, of the weights in `folder`."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from composer_jax.models.pretrained import open_unet

    unet = open_unet(folder).load()
    graph, params = nnx.split(unet)
    optimizer = optax.adamw(RATE, 0.9, 0.99, weight_decay=0.0)
    x, wanted, t, context = map(jnp.asarray, (x, wanted, t, context))

    def update(params, state):
        def loss(params):
            return jnp.mean((nnx.merge(graph, params)(x, t, context) - wanted) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state).compile()

    def step() -> float:
        nonlocal params, state
        params, state, value = compiled(params, state)
        return float(value)

    return step


def profile(ours, theirs) -> None:
    """Prints the operations that take longest."""
    import glob
    import gzip
    import json
    from collections import Counter

    import jax
    import torch

    with torch.profiler.profile() as recorded:
        theirs()
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=10)
    print("PyTorch:", *table.splitlines()[:14], sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            ours()
        (path,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    spent: Counter = Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            spent[event["name"].split(".")[0]] += event["dur"] / 1e3
    print("ours, ms by kind of instruction, over all threads:")
    for name, milliseconds in spent.most_common(10):
        print(f"  {name:40} {milliseconds:8.1f}")


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        import sys

        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main()
