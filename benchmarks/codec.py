"""What a codec keeps of images: `python benchmarks/codec.py --codec DIR [--source folder:PHOTOS]`.

PSNR over [0, 255] and the plain F1@1px of its sketches, which bound what any sample can reach.
"""

import argparse

import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.conditions.sketch import f1
from composer_jax.data.sources import open_source
from composer_jax.evaluation.control import reconstruct
from composer_jax.storage.models import find_part, load_codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="bundled", help="a run, a vae folder, or bundled")
    parser.add_argument("--source", default="scenes", help="default: held-out scenes")
    parser.add_argument("--count", type=int, default=256)
    args = parser.parse_args()
    source = open_source(args.source, size=64, split="test")
    images = source.batch(source.drawn(args.count, 0))["image"]
    vae, sketch = load_codec(find_part(args.codec, "vae")), conditions.get("sketch")
    decoded = reconstruct(vae, images)
    squared = np.mean((images.astype(np.float64) - decoded) ** 2, axis=(1, 2, 3))
    lines, found = sketch.extract(images) > 0, sketch.extract(decoded) > 0
    scores = [f1(a, b) for a, b in zip(lines, tqdm(found), strict=True)]
    print(f"{args.codec}: {len(images)} of {args.source}")
    print(f"PSNR {np.mean(10 * np.log10(255**2 / squared)):.2f} dB (mean over images), ", end="")
    print(f"{10 * np.log10(255**2 / squared.mean()):.2f} dB (of the mean squared error)")
    print(f"F1@1px of sketches {np.mean(scores):.4f}")


if __name__ == "__main__":
    main()
