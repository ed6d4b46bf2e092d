"""How fast Depth Anything V2 small is on this machine's CPU beside PyTorch, on the same weights.

    python benchmarks/depth.py            one 518 x 518 image at a time, alternating, in one run
    python benchmarks/depth.py --batch 4
    taskset -c 0 python benchmarks/depth.py   where others use the machine: one core for either

Needs torch. The weights are random: their values cost no time.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import torch
from flax import nnx
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from composer_jax.models.dpt_files import load_dpt


def peer() -> DepthAnythingForDepthEstimation:
    """transformers' network in the small configuration of Depth Anything V2."""
    vit = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        out_indices=[3, 6, 9, 12],
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=vit)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    model = peer()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        network = load_dpt(folder, jnp.float32)
    photo = network.config.preprocess.resize(skimage.data.astronaut()[None])
    images = np.asarray(network.config.preprocess.normalise(photo))
    images = np.repeat(images, arguments.batch, axis=0)
    graph, state = nnx.split(network)
    start = time.perf_counter()
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, images).compile()
    print(f"compilation          {time.perf_counter() - start:7.2f} s")
    ours = lambda: np.asarray(run(state, images))  # noqa: E731
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def theirs():
        with torch.no_grad():
            return model(tensor).predicted_depth.numpy()

    times = {ours: [], theirs: []}
    for _ in range(arguments.repeats + 1):
        for work, found in times.items():
            start = time.perf_counter()
            work()
            found.append((time.perf_counter() - start) / arguments.batch)
    mine, other = (statistics.median(found[1:]) for found in times.values())
    print(f"ours                 {mine:7.3f} s an image")
    print(f"PyTorch              {other:7.3f} s an image")
    print(f"PyTorch over ours    {other / mine:7.2f} x")


if __name__ == "__main__":
    main()
