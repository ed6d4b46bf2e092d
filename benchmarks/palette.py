"""How fast palettes are counted, against the direct pixel-by-codeword distance matrix.

    python benchmarks/palette.py [--all]

Prints images/s of 512 x 512 for both in one run, medians of several, and their largest difference.
`--all` also compares every one of the 256^3 colours (about a minute).
"""

import argparse
import statistics
import time

import numpy as np
from skimage import data
from skimage.transform import resize

from composer_jax.conditions.palette import BINS, NearestColour, Palette, lab_from_rgb


def direct_codes(lab: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The nearest codeword of every pixel by the whole distance matrix, [N]."""
    pixels = lab_from_rgb(image.reshape(-1, 3) / 255.0)
    distance = np.sum(lab**2, axis=1)[None, :] - 2.0 * pixels @ lab.T
    return distance.argmin(axis=1)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compare all 256^3 colours")
    arguments = parser.parse_args()
    palette, images = Palette(), photos()

    def direct(image):
        codes = direct_codes(palette.lab, image)
        return np.bincount(codes, minlength=BINS) / codes.size

    def ours(image):
        return palette.extract(image[None])[0]

    first = seconds(lambda image: Palette().extract(image[None]), images[:-1], 3)
    warm, slow = seconds(ours, images, 5), seconds(direct, images, 3)
    difference = max(np.abs(direct(image) - ours(image)).max() for image in images)
    print(f"direct distance matrix    {1 / slow:8.1f} images/s")
    print(f"a photo, colours not seen {1 / first:8.1f} images/s   {slow / first:6.1f} x")
    print(f"colours seen              {1 / warm:8.1f} images/s   {slow / warm:6.1f} x")
    print(f"largest difference of a bin {difference:.1e}")
    if arguments.all:
        wrong, nearest = 0, NearestColour(palette.lab)
        for red in range(256):
            plane = np.indices((256, 256)).transpose(1, 2, 0).astype(np.uint8)
            plane = np.concatenate([np.full((256, 256, 1), red, np.uint8), plane], axis=2)
            wrong += int((direct_codes(palette.lab, plane) != nearest(plane)).sum())
        print(f"colours with another codeword: {wrong} of {256**3}")


if __name__ == "__main__":
    main()
