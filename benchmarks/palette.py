"""How fast palettes are counted, against the direct pixel-by-codeword distance matrix.

    python benchmarks/palette.py            images/s of 512 x 512 both ways, in one run
    python benchmarks/palette.py --make     also makes the bundled table anew (about a minute)

`--make` says how many of all 256^3 colours had another codeword in the table that was there.
"""

import argparse
import statistics
import time

import numpy as np
from skimage import data
from skimage.transform import resize

from composer_jax.conditions.palette import BINS, TABLE, Palette, nearest_codes, nearest_table


def photos() -> list[np.ndarray]:
    """Photos of scikit-image at 512 x 512, and noise (every colour equally likely)."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    found = [resize(image, (512, 512), preserve_range=True).astype(np.uint8) for image in sources]
    return [*found, np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)]


def seconds(work, images, repeats: int) -> float:
    """Median seconds per image."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for image in images:
            work(image)
        times.append((time.perf_counter() - start) / len(images))
    return statistics.median(times)


def make(lab: np.ndarray) -> np.ndarray:
    """The codes of all colours, uint8 [256^3], a plane of equal red at a time."""
    plane = np.indices((256, 256), np.uint8).reshape(2, -1).T
    codes = []
    for red in range(256):
        colours = np.concatenate([np.full((len(plane), 1), red, np.uint8), plane], axis=1)
        codes.append(nearest_codes(colours, lab))
    return np.concatenate(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", action="store_true", help="make the bundled table anew")
    arguments = parser.parse_args()
    palette, images = Palette(), photos()
    if arguments.make:
        codes = make(palette.lab)
        if TABLE.is_file():
            print(f"colours with another codeword: {(codes != nearest_table()).sum()} of {256**3}")
        np.savez_compressed(TABLE, codes=codes)

    def direct(image):
        codes = nearest_codes(image.reshape(-1, 3), palette.lab)
        return np.bincount(codes, minlength=BINS) / codes.size

    def ours(image):
        return palette.extract(image[None])[0]

    def first(image):
        nearest_table.cache_clear()
        return ours(image)

    cold, warm, slow = (
        seconds(first, images, 3),
        seconds(ours, images, 5),
        seconds(direct, images, 3),
    )
    difference = max(np.abs(direct(image) - ours(image)).max() for image in images)
    print(f"direct distance matrix       {1 / slow:8.1f} images/s")
    print(f"first image of a process     {1 / cold:8.1f} images/s   {slow / cold:6.1f} x")
    print(f"all others                   {1 / warm:8.1f} images/s   {slow / warm:6.1f} x")
    print(f"largest difference of a bin  {difference:.1e}")


if __name__ == "__main__":
    main()
