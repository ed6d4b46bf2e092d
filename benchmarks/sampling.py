"""Sampling with guidance against diffusers' PyTorch UNet, on the same weights, in one run.

    python benchmarks/sampling.py                      half of SD 1.5's widths, 32 x 32 latents
    python benchmarks/sampling.py --profile            and where the time of an evaluation goes
    python benchmarks/sampling.py --size sd15 --batch 1 --peers eager     the whole of it, 512 px
    taskset -c 0 python benchmarks/sampling.py         where others use the machine: one core

From noise to latents by DDIM steps of a UNet in Stable Diffusion's layout with random weights, both
guidance rows in one batch. Ours is one jitted scan; theirs the usual loop around
UNet2DConditionModel and DDIMScheduler: as it is, with its weights and maps channels last, and under
torch.compile. All are warmed up, then take turns; medians of times, and of ratios within a turn.

Widths and sides both halved keep the structure and most of the balance between convolutions, linear
layers and attention, and a run takes minutes where the whole size takes an hour. Ours on a GPU is
bfloat16 by default; so are the peers, if their PyTorch has CUDA, else they are left out.
Needs the extra `parity`. Results: benchmarks/RESULTS.md.
"""

import argparse
import copy
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from composer_jax.cli import HUGE_PAGES

SIZES = {  # widths, side of the latents
    "small": ((64, 128, 256, 256), 16),
    "half": ((160, 320, 640, 640), 32),
    "sd15": ((320, 640, 1280, 1280), 64),
}
PEERS = ("eager", "channels_last", "compile")
GUIDANCE, TOKENS, CONTEXT = 7.5, 77, 768
KINDS = {  # what a profile calls an operation -> its kind
    "convolution": r"convolution|aten::_?conv",
    "attention": r"attention|attend",
    "linear": r"linear|aten::(add|b)?mm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="half")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    import jax
    import torch

    gpu = jax.default_backend() == "gpu"
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    widths, side = SIZES[args.size]
    print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} CPU cores, {dtype}; "
          f"jax {jax.__version__}, torch {torch.__version__}\n{args.size}: widths {widths}, "
          f"{side} x {side} latents, {args.steps} steps, guidance {GUIDANCE}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peer = make_peer(folder, widths, side)
        state, sampler = our_sampler(folder, dtype, args.steps)
    peer = peer.to("cuda" if gpu and torch.cuda.is_available() else "cpu", getattr(torch, dtype))
    names = args.peers if peer.device.type == "cuda" or not gpu else ()
    peers = {name: prepared(peer, name) for name in names}
    for batch in args.batch:
        rng = np.random.default_rng(batch)
        noise = rng.standard_normal((batch, side, side, 4), np.float32)
        context = rng.standard_normal((2 * batch, TOKENS, CONTEXT), np.float32)
        start = time.perf_counter()
        compiled = sampler.lower(state, noise, context).compile()
        print(f"batch {batch}: ours compiles in {time.perf_counter() - start:.1f} s")
        runs = {"ours": lambda: np.asarray(compiled(state, noise, context))}  # noqa: B023
        for name, unet in peers.items():
            runs[name] = their_sampler(unet, noise, context, args.steps)
        take_turns(runs, batch, args.repeats)
        if args.profile:
            profile_ours(runs["ours"], compiled.as_text(), args.steps)
            for name in [name for name in peers if name != "compile"]:
                profile_theirs(name, runs[name], args.steps)


def make_peer(folder: str, widths: tuple[int, ...], side: int):
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    options = {"cross_attention_dim": CONTEXT, "attention_head_dim": 8, "sample_size": side}
    peer = UNet2DConditionModel(block_out_channels=widths, **options)
    peer.save_pretrained(folder)
    return peer.eval()


def prepared(peer, name: str):
    import torch

    if name == "channels_last":
        return copy.deepcopy(peer).to(memory_format=torch.channels_last)
    return torch.compile(peer) if name == "compile" else peer


def our_sampler(folder: str, dtype: str, steps: int):
    """The weights, and a jitted function of them, noise and context that returns latents."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from composer_jax.diffusion import Process, sample
    from composer_jax.models.pretrained import open_unet

    graph, state = nnx.split(open_unet(folder).load(getattr(jnp, dtype)))
    process = Process(prediction="eps", schedule="sd")

    def run(state, noise, context):
        unet = nnx.merge(graph, state)
        projected = unet.project_context(context.astype(dtype))

        def evaluate(x, t, index):
            rows = jnp.concatenate([x, x]).astype(dtype)
            eps = unet(rows, jnp.full(len(rows), process.timestep(t)), projected)
            absent, given = jnp.split(eps.astype(jnp.float32), 2)
            return absent + GUIDANCE * (given - absent)

        return sample(evaluate, noise, process.times(steps, "trailing"), process, "ddim")

    return state, jax.jit(run)


def their_sampler(unet, noise: np.ndarray, context: np.ndarray, steps: int) -> Callable:
    """diffusers' loop, as a function without arguments that returns latents."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    first = next(unet.parameters())
    x_T = torch.from_numpy(noise).permute(0, 3, 1, 2).to(first.device)  # channels last in memory
    if not unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        x_T = x_T.contiguous()
    tokens = torch.from_numpy(context).to(first.device, first.dtype)

    @torch.no_grad()
    def run() -> np.ndarray:
        x = x_T
        for t in scheduler.timesteps:
            eps = unet(torch.cat([x, x]).to(first.dtype), t, encoder_hidden_states=tokens).sample
            absent, given = eps.float().chunk(2)
            x = scheduler.step(absent + GUIDANCE * (given - absent), t, x).prev_sample
        return x.permute(0, 2, 3, 1).cpu().numpy()

    return run


def take_turns(runs: dict[str, Callable], batch: int, repeats: int) -> None:
    """Prints seconds an image, our time over each peer's, and how far results are apart."""
    results, first = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        results[name] = run()
        first[name] = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"  {name:14} first run {first[name]:6.1f} s, peak memory so far {peak:.1f} GB")
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / batch)
    for name, theirs in times.items():
        line = f"  {name:14} {statistics.median(theirs):7.3f} s an image"
        if name != "ours":
            ratio = statistics.median(a / b for a, b in zip(times["ours"], theirs, strict=True))
            apart = np.linalg.norm(results["ours"] - results[name]) / np.linalg.norm(results[name])
            line += f"; ours takes {ratio:.2f} of it; results {apart:.1e} apart"
        print(line)


def profile_ours(run: Callable, hlo: str, steps: int) -> None:
    import jax

    pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = \S+ ([\w-]+)\(.*?op_name="([^"]*)"'
    found = {name: (op, where) for name, op, where in re.findall(pattern, hlo, re.MULTILINE)}
    kinds = {name: where for name, (op, where) in found.items() if op not in ("while", "call")}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [e for plane in planes for line in plane.lines for e in line.events]
    report("ours", [(kinds[e.name], e.duration_ns / 1e9) for e in events if e.name in kinds], steps)


def profile_theirs(name: str, run: Callable, steps: int) -> None:
    import torch

    with torch.profiler.profile() as profiler:
        run()
    events = profiler.key_averages()
    report(name, [(e.key, e.self_cpu_time_total / 1e6) for e in events], steps)


def report(name: str, events: list[tuple[str, float]], steps: int) -> None:
    """Prints milliseconds of an evaluation by kind of operation."""
    totals = Counter()
    for what, seconds in events:
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, what)), "other")
        totals[kind] += seconds * 1e3 / steps
    listed = ", ".join(f"{kind} {totals[kind]:.0f}" for kind in (*KINDS, "other"))
    print(f"  {name:14} ms an evaluation: {listed}; {totals.total():.0f} together")


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:  # huge pages for both sides, as `composer` takes them
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if "--profile" in sys.argv:
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_xprof_traceme=true"
        )
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory, too
    main()
