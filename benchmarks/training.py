"""A train step of our UNet against diffusers' in PyTorch, on the same weights, in one run.

    taskset -c 0 python benchmarks/training.py            scenes64's, on one core
    python benchmarks/training.py --batch 64 --profile
    python benchmarks/training.py --size sd15 --dtype bfloat16 --batch 32     on a GPU

Gradient of a mean squared error, and AdamW on float32 parameters; latents with local conditions and
a context come ready: 8 x 8 x 80, folded, and 72 tokens for scenes64, 64 x 64 x 20 and 128 tokens
for Stable Diffusion's sizes. On a GPU, PyTorch's is compiled, channels last, its AdamW fused; in
bfloat16 it runs under autocast. Both are warmed up, then take turns; medians of times and of ratios
within a turn. The first losses must agree, and so must those after all steps, nearly. FLOPs are
those of PyTorch's operations, forward and backward, for both. Needs the extra `parity`.
Results: benchmarks/RESULTS.md.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace

from composer_jax.cli import HUGE_PAGES

RATE = 1e-4
STEPS = 4  # of a turn
SIZES = ("scenes64", "sd15", "sd21")
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="scenes64")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="where PyTorch's time and ours goes")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    import jax
    import numpy as np
    import torch

    from composer_jax.training.hardware import chip_of

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config, side, tokens = shape_of(args.size)
    rng = np.random.default_rng(0)
    shape = (args.batch, side, side)
    channels = config.in_channels, config.out_channels
    x, wanted = (rng.standard_normal((*shape, c), np.float32) for c in channels)
    t = rng.uniform(0.0, 1000.0, args.batch).astype(np.float32)
    context = rng.standard_normal((args.batch, tokens, config.cross_attention_dim), np.float32)
    batch = x, wanted, t, context
    with tempfile.TemporaryDirectory() as folder:
        theirs, flops = their_step(folder, config, args.dtype, *batch)
        start = time.perf_counter()
        ours = our_step(folder, args.dtype, *batch)
        compiled = time.perf_counter() - start
    first = ours(), theirs()
    np.testing.assert_allclose(*first, rtol=TOLERANCES[args.dtype])
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
    device = jax.devices()[0].device_kind
    print(f"{args.size}, {device}, {len(os.sched_getaffinity(0))} cores, batch {args.batch}, "
          f"{args.dtype}; jax {jax.__version__}, torch {torch.__version__}\n"
          f"ours {mine:.0f} ms (compiled in {compiled:.0f} s), PyTorch {peer:.0f} ms; ratio "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); losses "
          f"{ours():.4f} and {theirs():.4f} after {2 + STEPS * args.turns} steps")  # fmt: skip
    chip = chip_of(device)
    for name, milliseconds in (("ours", mine), ("PyTorch", peer)):
        share = f", {flops / milliseconds * 1e3 / chip.flops:.1%} of the peak" if chip else ""
        print(f"{name}: {args.batch / milliseconds * 1e3:.1f} images/s, "
              f"{flops / args.batch / 1e12:.3f} TFLOP an image{share}")  # fmt: skip
    if args.profile:
        profile(ours, theirs)


def shape_of(size: str):
    """The UNet's config, its map's side and how many tokens its context has."""
    from composer_jax.models.unet import PRESETS

    if size == "scenes64":  # as `scenes64:cpu` is inside, where latents are folded
        return replace(PRESETS[size], in_channels=88, out_channels=24, patch=1), 8, 72
    return replace(PRESETS[size], in_channels=20, out_channels=4), 64, 128


def their_step(folder: str, config, dtype: str, x, wanted, t, context):
    """Writes random weights; returns a function that trains a step, of the loss, and its FLOPs."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from composer_jax.models.layouts import unet_to_diffusers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(unet_to_diffusers(config))
    unet.save_pretrained(folder)
    unet.train().to(device)
    x, wanted = (torch.from_numpy(array.transpose(0, 3, 1, 2).copy()) for array in (x, wanted))
    x, wanted, t, context = (
        a.to(device) for a in (x, wanted, torch.from_numpy(t), torch.from_numpy(context))
    )
    network = unet
    if device == "cuda":
        unet.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        network = torch.compile(unet)
    optimizer = torch.optim.AdamW(
        unet.parameters(), RATE, (0.9, 0.99), weight_decay=0.0, fused=device == "cuda"
    )

    def gradient(network):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            found = network(x, t, context).sample
        loss = ((found.float() - wanted) ** 2).mean()
        loss.backward()
        return loss

    def step() -> float:
        loss = gradient(network)
        optimizer.step()
        return loss.item()

    with FlopCounterMode(display=False) as counter:
        gradient(unet)
    return step, counter.get_total_flops()


def our_step(folder: str, dtype: str, x, wanted, t, context):
    """The same, of the weights in `folder`."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from composer_jax.models.initializers import abstract
    from composer_jax.models.pretrained import open_unet
    from composer_jax.models.unet import UNet

    opened = open_unet(folder)
    graph, _ = nnx.split(abstract(UNet, opened.config, dtype=jnp.dtype(dtype)))
    params = nnx.state(opened.load())
    optimizer = optax.adamw(RATE, 0.9, 0.99, weight_decay=0.0)
    x, wanted, t, context = map(jnp.asarray, (x, wanted, t, context))

    def update(params, state):
        def loss(params):
            found = nnx.merge(graph, params)(x, t, context).astype(jnp.float32)
            return jnp.mean((found - wanted) ** 2)

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
