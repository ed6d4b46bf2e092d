"""What an H100 would run to sample at Stable Diffusion's size, compiled where there is none.

    pip install -e '.[cuda]'
    JAX_PLATFORMS=cpu python benchmarks/gpu_program.py

The whole sampler (eight conditions, guidance, 512 px, bfloat16, the codec) is compiled ahead of
time for a described device. Printed of each computation: cuDNN's convolutions and attentions, and
what moves arrays about: transpositions and copies. Layers stand in branches of the loop, where
nothing large is to be moved; weights are transposed once, before it.
"""

import argparse
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from composer_jax import conditions
from composer_jax.diffusion.process import Process
from composer_jax.models.composer import Composer, ComposerConfig
from composer_jax.models.initializers import abstract
from composer_jax.models.unet import PRESETS, UNetConfig
from composer_jax.models.vae import PRESETS as CODECS
from composer_jax.models.vae import VAE
from composer_jax.sampling.job import Frame, make_job
from composer_jax.sampling.options import Options
from composer_jax.sampling.program import Networks, program

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" runtime_version { major: 12 minor: 9 } dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", choices=("sd15", "sd21"), default="sd15")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--keep", metavar="FILE", help="write the HLO there")
    args = parser.parse_args()
    assume_hopper()
    start = time.perf_counter()
    compiled = lowered(args, described()).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    memory = compiled.memory_analysis()
    print(f"memory: weights and inputs {memory.argument_size_in_bytes / 2**30:.2f} GiB, "
          f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB")  # fmt: skip
    text = compiled.as_text()
    if args.keep:
        with open(args.keep, "w") as file:
            file.write(text)
    show(text)


def assume_hopper() -> None:
    """jax asks the GPU at hand how wide heads may be; the one described here is a Hopper."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_compute_capability = lambda capability: True


def described():
    """The H100 as the place of a program's arguments."""
    topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def lowered(args, device):
    unet = PRESETS[args.unet].to_dict()
    text_width = unet["cross_attention_dim"]
    config = ComposerConfig(
        unet=UNetConfig.from_dict(unet | {"in_channels": unet["in_channels"] + 16}),
        conditions=tuple(conditions.names()),
        sizes={"text_length": 77, "text_width": text_width, "embed_width": 768},
        stem_width=128,
    )
    frame = Frame(config, Process(prediction="eps", schedule="sd"), 512, 64)
    options = Options(steps=args.steps, solver="ddim", guidance=7.5, batch=args.batch)
    job = make_job(frame, options, {}, [{}], [(0, 0)], rows=2)
    inputs, _ = next(job.inputs())

    def placed(leaf, dtype=None):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=device)

    composer = abstract(Composer, config, dtype=jnp.bfloat16)
    graph, state = nnx.split((composer, abstract(VAE, CODECS["sd"], dtype=jnp.bfloat16)))
    state = jax.tree.map(lambda leaf: placed(leaf, jnp.bfloat16), state)

    def run(state, inputs):
        return program(Networks(*nnx.merge(graph, state)), frame.process, job.kind, inputs)

    return jax.jit(run).lower(state, jax.tree.map(placed, inputs))


def show(text: str) -> None:
    """Prints what each computation that layers stand in is made of."""
    computations = {
        name: body
        for name, body in re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    }
    pattern = r"^\s*(?:ROOT )?%([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\("
    for name, body in computations.items():
        calls = Counter(re.findall(r'custom_call_target="__cudnn\$(\w+)"', body))
        if not calls:
            continue
        print(f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(calls.items())))
        moved, sizes = Counter(), Counter()
        for what, dtype, shape, kind in re.findall(pattern, body, re.M):
            moves = "transpose" if "transpose" in what else kind
            if moves in ("transpose", "copy"):
                size = BYTES[dtype]
                for side in filter(None, shape.split(",")):
                    size *= int(side)
                moved[moves] += 1
                sizes[moves] += size
        for kind, count in moved.items():
            print(f"    {kind}: {count}, {sizes[kind] / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
