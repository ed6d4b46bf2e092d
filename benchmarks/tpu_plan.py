"""Ours and diffusers' train step, compiled ahead of time for TPUs that are not here.

    pip install -e '.[tpu]' 'diffusers>=0.35,<0.36'
    python benchmarks/tpu_plan.py                      v5p:2x2x1, batch 4 a chip, fsdp 4
    python benchmarks/tpu_plan.py --preset sd21
    python benchmarks/tpu_plan.py --weak               ours on v5e:4x4 and 16x16, batch 16 a chip

Both take gradients of the UNet and update it with AdamW in bfloat16 over float32 parameters; ours
also encodes eight conditions from 512 px, draws them and keeps an average. Times are the compiler's
estimates, in two columns: as it makes them, and with the fused attention's arithmetic, which is
told to the compiler in full (heads padded to 128, logits computed again), at SHARE of the peak
instead of all of it. `--peer-options` gives diffusers the compiler options that our training takes.

`--weak` splits the state over 16 chips (fsdp) and the examples over all, and prints the collectives
of a step: their bytes, those under way while something is computed, and how long all and the others
take at the speed of the links that they have, as a share of the least time of a step: its FLOPs at
the peak (the compiler's estimate for v5e is negative).
"""

import argparse
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from composer_jax.models.unet import PRESETS
from composer_jax.training import plan
from composer_jax.training.config import load_config
from composer_jax.training.hardware import Chip, chip_of, devices_of
from composer_jax.training.sharding import batch_sharding, make_mesh, shard_tree

SHARE = 0.6  # of the peak, that a fused attention reaches
SPLIT = 16  # chips that share one state when a batch grows with the chips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("sd15", "sd21"), default="sd15")
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--per-chip", type=int, help="default: 4, with --weak 16")
    parser.add_argument("--only", choices=("ours", "diffusers"))
    parser.add_argument("--peer-options", action="store_true")
    parser.add_argument("--weak", nargs="*", metavar="TOPOLOGY")
    args = parser.parse_args()
    if args.weak is not None:
        weak(args.preset, args.weak or ["v5e:4x4", "v5e:16x16"], args.per_chip or 16)
        return
    devices, each = devices_of(args.topology), args.per_chip or 4
    batch, chip = each * len(devices), chip_of(devices[0].device_kind)
    print(f"{args.preset}, {args.topology}, batch {each} a chip, fsdp {len(devices)}")
    columns = "XLA ms, kernels at a share ms, TFLOP, GB moved, temporaries GiB, compiled in s"
    print(f"{'':12s}{columns}", flush=True)
    times = {}
    for name, program in (("diffusers", peer), ("ours", ours)):
        if args.only in (None, name):
            cost, text = program(args.preset, devices, batch, args.peer_options)
            times[name] = report(name, cost, text, chip)
    if len(times) == 2:
        xla, honest = (times["ours"][i] / times["diffusers"][i] for i in (0, 1))
        print(f"ours / diffusers: {xla:.3f} by XLA, {honest:.3f} with kernels at {SHARE:.0%}")


def report(name: str, cost: plan.Cost, text: str, chip: Chip) -> tuple[float, float]:
    """Prints a row; returns the compiler's seconds, and those with kernels at SHARE of the peak."""
    if cost.seconds is None:
        raise SystemExit(f"{name}: the compiler's estimate makes no sense")
    kernels, flops = kernel_flops(text)
    honest = cost.seconds + flops / chip.flops * (1 / SHARE - 1)
    gib = cost.temporaries / 2**30
    print(f"{name:12s}{cost.seconds * 1e3:.1f}, {honest * 1e3:.1f}, {cost.flops / 1e12:.2f}, "
          f"{cost.bytes / 1e9:.0f}, {gib:.1f}, {cost.compile_seconds:.0f}; {kernels} kernels, "
          f"{flops / 1e12:.2f} TFLOP of them", flush=True)  # fmt: skip
    for kind, traffic in cost.collectives.items():
        print(f"{'':12s}{kind}: {traffic.count}, {traffic.bytes / 1e9:.2f} GB")
    return cost.seconds, honest


def kernel_flops(text: str) -> tuple[int, float]:
    """How many Pallas kernels a program has, and the FLOPs that the compiler was told of them.

    XLA puts in kernels of its own, of which nobody tells it.
    """
    target = re.compile(r'custom_call_target="tpu_custom_call".*pallas_call')
    calls = [line for line in text.splitlines() if target.search(line)]
    told = [re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', line) for line in calls]
    if None in told:
        raise SystemExit("a kernel came without its cost")
    return len(calls), float(sum(int(found[1]) for found in told))


def configured(preset: str, fsdp: int):
    """The config of our composer at a preset's size."""
    config = load_config(f"{preset}_composer")
    with config.unlocked():
        config.mesh = {"data": -1, "fsdp": fsdp, "tensor": 1}
        config.image_size, config.codec = 512, "a/codec"
    return config


def ours(preset: str, devices: list, batch: int, _=False, fsdp=None) -> tuple[plan.Cost, str]:
    """Our whole train step, its state split over `fsdp` devices, or over all."""
    start = time.perf_counter()
    config = configured(preset, fsdp or len(devices))
    compiled, text = plan.compile_step(config, devices, batch)
    seconds = time.perf_counter() - start
    return plan.measure(compiled, text, batch, len(devices), seconds), text


def peer(preset: str, devices: list, batch: int, same: bool) -> tuple[plan.Cost, str]:
    """diffusers' Flax UNet: noise, a squared error, AdamW; latents and context come ready."""
    from diffusers import FlaxUNet2DConditionModel

    shape, mesh = PRESETS[preset], make_mesh(data=1, fsdp=-1, devices=devices)
    heads = shape.heads if len(set(shape.heads)) > 1 else shape.heads[0]
    unet = FlaxUNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=shape.cross_attention_dim,
        attention_head_dim=heads,
        use_linear_projection=shape.use_linear_projection,
        dtype=jnp.bfloat16,
    )
    optimizer = optax.adamw(1e-5)
    params = jax.eval_shape(lambda: unet.init_weights(jax.random.key(0)))
    state = jax.eval_shape(lambda: (params, optimizer.init(params)))
    shardings = shard_tree(state, mesh, (("kernel", "fsdp"),))

    def step(state, batch, seed):
        params, moments = state
        noise_key, time_key = jax.random.split(jax.random.key(seed))
        noise = jax.random.normal(noise_key, batch["latents"].shape)
        t = jax.random.randint(time_key, noise.shape[:1], 0, 1000)
        angle = (t / 1000.0 * jnp.pi / 2)[:, None, None, None]
        x_t = jnp.cos(angle) * batch["latents"] + jnp.sin(angle) * noise

        def loss(params):
            found = unet.apply({"params": params}, x_t, t, batch["context"]).sample
            return jnp.mean((found.astype(jnp.float32) - noise) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def placed(s, sharding):
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    rows, one = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    inputs = {
        "latents": jax.ShapeDtypeStruct((batch, 4, 64, 64), jnp.float32, sharding=rows),
        "context": jax.ShapeDtypeStruct(
            (batch, 77, shape.cross_attention_dim), jnp.bfloat16, sharding=rows
        ),
    }
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace(
        jax.tree.map(placed, state, shardings),
        inputs,
        jax.ShapeDtypeStruct((), jnp.uint32, sharding=one),
    )
    lowered = traced.lower(lowering_platforms=("tpu",))
    compiled, text = plan.compile_readably(lowered, devices[0], None if same else {})
    seconds = time.perf_counter() - start
    return plan.measure(compiled, text, batch, len(devices), seconds), text


def weak(preset: str, topologies: list[str], per_chip: int) -> None:
    """Prints what our step sends on each topology, and how the bytes grow from the first on."""
    first = None
    for topology in topologies:
        devices = devices_of(topology)
        chip, share = chip_of(devices[0].device_kind), links_used(devices)
        cost, _ = ours(preset, devices, per_chip * len(devices), fsdp=SPLIT)
        speed, total = chip.link * share, sum(t.bytes for t in cost.collectives.values())
        least, first = cost.flops / chip.flops, first or total
        whole, waited = (seconds / least for seconds in link_seconds(cost, speed))
        print(f"{preset} on {topology}, batch {per_chip} a chip: {cost.flops / 1e12:.1f} TFLOP, at "
              f"least {least * 1e3:.0f} ms; peak {cost.peak / 2**30:.1f} GiB; compiled in "
              f"{cost.compile_seconds:.0f} s")  # fmt: skip
        print(f"    collectives: {total / 1e9:.2f} GB a chip and step, {total / first:.3f} of the "
              f"first topology's;\n    at {speed / 1e9:.0f} GB/s {whole:.1%} of that time, "
              f"{waited:.1%} while nothing is computed")  # fmt: skip
        for kind, traffic in cost.collectives.items():
            said = f"{traffic.bytes / 1e9:.2f} GB, {traffic.hidden / 1e9:.2f} hidden"
            print(f"{'':8s}{kind}: {traffic.count}, {said}", flush=True)


def links_used(devices: list) -> float:
    """The share of a chip's links that lead along a group of chips which share a state."""
    group = make_mesh(data=-1, fsdp=SPLIT, devices=devices).devices[0, :, 0]

    def extent(chips) -> int:
        return sum(len(set(axis)) > 1 for axis in zip(*(c.coords for c in chips), strict=True))

    return extent(group) / extent(devices)


def link_seconds(cost: plan.Cost, speed: float) -> tuple[float, float]:
    """Seconds on the links: of all collectives, and of those while which nothing is computed."""

    def passes(kind: str) -> int:
        return 2 if kind == "all-reduce" else 1  # a ring reduces, then gathers

    every = sum(passes(kind) * t.bytes for kind, t in cost.collectives.items())
    hidden = sum(passes(kind) * t.hidden for kind, t in cost.collectives.items())
    return every / speed, (every - hidden) / speed


if __name__ == "__main__":
    main()
