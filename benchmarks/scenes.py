"""Speed of the built-in world: `python benchmarks/scenes.py` prints images/s at 64 px."""

import time

from composer_jax.data.scenes import Scenes

COUNT, ROUNDS = 640, 5


def main() -> None:
    """Median of several rounds, compilation apart; descriptions and captions included."""
    source = Scenes(COUNT, size=64)
    source.batch(range(32))
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        source.batch(range(COUNT))
        rates.append(COUNT / (time.perf_counter() - start))
    print(f"{sorted(rates)[ROUNDS // 2]:.0f} images/s at 64 px")


if __name__ == "__main__":
    main()
