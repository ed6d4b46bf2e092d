"""Stable Diffusion at full size against diffusers: outputs, conversion's time and memory.

    python benchmarks/stable_diffusion.py --which sd15 --seed 0

Makes a UNet and a VAE of the exact configuration with random weights, saves them by diffusers,
converts them to our layout and back (each in a process of its own, whose time and peak memory are
printed beside diffusers' own load), and compares one evaluation at 64 x 64 latents, one encoding
and one decoding of 512 px, float32, relative L2. Needs the extra `parity` and 12 GB of memory.

On 2 CPU cores, jax 0.10.2, PyTorch 2.13, SD 2.1: 15.6 s and 0.49 GB there, 14.9 s and 0.49 GB
back, our load 14.4 s and 3.71 GB (diffusers' 5.8 s, which leaves the file mapped, unread); UNet
1.2e-6, moments 1.8e-6, images 5.3e-6. SD 1.5: UNet 1.3e-6, moments 1.7e-6, images 4.4e-6.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

UNETS = {
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
             "use_linear_projection": True, "sample_size": 96},
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
LOAD = (
    "import sys, torch; from diffusers import UNet2DConditionModel as U; "
    "U.from_pretrained(sys.argv[1], subfolder='unet')"
)

OUR_LOAD = (
    "import sys, jax; from flax import nnx; from composer_jax.models.pretrained import open_unet; "
    "jax.block_until_ready(nnx.state(open_unet(sys.argv[1]).load()))"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--which", choices=tuple(UNETS), default="sd15")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peer, ours, back = (Path(folder) / name for name in ("peer", "ours", "back"))
        in_child(make, peer, args.which, args.seed, args.dtype)
        size = sum(f.stat().st_size for f in (peer / "unet").iterdir())
        print(f"UNet of {args.which}, {args.dtype}: {size / 1e9:.2f} GB")
        convert = (sys.executable, "-m", "composer_jax", "convert")
        prediction = ("--prediction", "v" if args.which == "sd21" else "eps")
        report(
            "convert to ours", size, *convert, str(peer / "unet"), "--out", str(ours), *prediction
        )
        report("and back", size, *convert, str(ours), "--out", str(back), "--to", "diffusers")
        report("our load", size, sys.executable, "-c", OUR_LOAD, str(peer))
        report("diffusers' load", size, sys.executable, "-c", LOAD, str(peer))
        in_child(compare, peer, ours, back, args.seed)


def in_child(function, *args) -> None:
    """Runs a function in a process of its own, so that its memory is given back."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        sys.exit(f"{function.__name__} failed")


def report(name: str, size: int, *command: str) -> None:
    """Runs a command; prints its seconds and its peak memory over the size of the weights."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    if status:
        sys.exit(f"{name} failed with {status}: {' '.join(command)}")
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
    print(f"{name}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB, {peak / size:.2f} x the weights")


def make(folder: Path, which: str, seed: int, dtype: str) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    for name, model in (
        ("unet", UNet2DConditionModel(**UNETS[which])),
        ("vae", AutoencoderKL(**VAE)),
    ):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p) if p.ndim == 1 else 0.0)
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)


def compare(peer: Path, ours: Path, back: Path, seed: int) -> None:
    import jax
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from flax import nnx

    from composer_jax.models.pretrained import open_unet, open_vae

    rng = np.random.default_rng(seed)
    unet = UNet2DConditionModel.from_pretrained(peer, subfolder="unet", torch_dtype=torch.float32)
    x = rng.standard_normal((1, 64, 64, 4), np.float32)
    context = rng.standard_normal((1, 77, unet.config.cross_attention_dim), np.float32)
    t = np.float32([481.0])
    with torch.no_grad():
        args = nchw(x), torch.from_numpy(t), torch.from_numpy(context)
        start = time.perf_counter()
        wanted = unet(*args).sample.numpy()
        theirs = time.perf_counter() - start
        again = UNet2DConditionModel.from_pretrained(
            back, subfolder="unet", torch_dtype=torch.float32
        )
        exported = again(*args).sample.numpy()
        del again, unet
    print(f"UNet exported and loaded by diffusers: {distance(exported, wanted):.1e}")
    for name, source in (("from ours", ours), ("from diffusers'", peer)):
        start = time.perf_counter()
        graph, state = nnx.split(open_unet(source).load())
        loading = time.perf_counter() - start
        run = jax.jit(lambda state, *args, graph=graph: nnx.merge(graph, state)(*args))
        compiled = run.lower(state, x, t, context).compile()
        start = time.perf_counter()
        found = np.asarray(compiled(state, x, t, context))
        seconds = time.perf_counter() - start
        error = distance(found.transpose(0, 3, 1, 2), wanted)
        print(f"UNet {name}: {error:.1e}; loaded in {loading:.1f} s, an evaluation takes "
              f"{seconds:.1f} s, PyTorch's {theirs:.1f} s")  # fmt: skip
        del state
    images = rng.uniform(-1.0, 1.0, (1, 512, 512, 3)).astype(np.float32)
    theirs = AutoencoderKL.from_pretrained(peer, subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        moments = theirs.encode(nchw(images)).latent_dist
        wanted = theirs.decode(moments.mean).sample.numpy()
    vae = open_vae(peer).load()
    found = np.asarray(nnx.jit(lambda vae, images: vae.encode(images))(vae, images))
    parameters = torch.cat([moments.mean, moments.logvar], 1).numpy()
    latents = vae.latents(nhwc(parameters))
    decoded = np.asarray(nnx.jit(lambda vae, z: vae.decode(z))(vae, latents))
    print(f"VAE moments {distance(found, nhwc(parameters)):.1e}, "
          f"images {distance(decoded, nhwc(wanted)):.1e}")  # fmt: skip


def nchw(array: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2."""
    difference = np.linalg.norm(found.astype(np.float64) - wanted)
    return float(difference / np.linalg.norm(wanted.astype(np.float64)))


if __name__ == "__main__":
    main()
