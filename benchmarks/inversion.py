"""From images to noise and back: `python benchmarks/inversion.py --model DIR`.

PSNR in latents of x0 -> x_T -> x0 for every solver and way that `invert` has, on held-out scenes,
under no conditions and under a sketch and a palette, with and without guidance.
"""

import argparse

import numpy as np

from composer_jax.commands.decompose import decompose
from composer_jax.data.sources import open_source
from composer_jax.diffusion.inversion import WAYS
from composer_jax.sampling.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=4, help="scenes")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    pipe = Pipeline.load(args.model)
    source = open_source(f"scenes:{args.count}", size=pipe.size, split="test")
    images = source.batch(range(args.count))["image"]
    x0 = pipe.encode(images)
    stored = decompose(images[0], only=("sketch", "palette"))
    print(f"{args.count} held-out scenes, {args.steps} steps; dB in latents there and back")
    for given in ({}, stored):
        for guidance in (1.0, 2.0) if given else (1.0,):
            for way, solvers in WAYS.items():
                for solver in solvers:
                    options = {"steps": args.steps, "guidance": guidance, "solver": solver}
                    noise = pipe.invert(images, given, way=way, **options)
                    options |= {"count": args.count, "noise": noise, "output": "latents"}
                    psnr = 10 * np.log10(
                        np.ptp(x0) ** 2 / np.mean((pipe(given, **options) - x0) ** 2)
                    )
                    asked = " + ".join(given) or "nothing"
                    print(
                        f"given {asked:17} guidance {guidance:g}  {solver:6} {way:12} {psnr:6.1f}"
                    )


if __name__ == "__main__":
    main()
