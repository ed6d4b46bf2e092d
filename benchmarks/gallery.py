"""Pictures of a composer: `python benchmarks/gallery.py [--model DIR] [--source TEXT] --out docs`.

OUT/samples.png: held-out images (scenes, unless another source is named), and samples given one of
their conditions alone, everything, nothing. Of scenes OUT/captions.png, too: the first sample of
each of twenty captions that no config contains, with the share of what each says that the frozen
detector finds.
"""

import argparse
from pathlib import Path

import numpy as np

from composer_jax.data.sources import Source, open_source
from composer_jax.diffusion import Use
from composer_jax.evaluation.control import extract_all, sample_each
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.evaluation.pictures import grid, labelled_sheet
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.utils.png import save_png

ROWS, CELL = 8, 96
CAPTIONS = (
    "a red cone left of a blue ball",
    "a large yellow ball",
    "a small white cube on a dark floor",
    "two green cylinders",
    "a purple torus under a pink sky",
    "three small orange balls on a grey floor",
    "a large shiny cyan cone behind a small brown cube",
    "a pink ball right of a green cube on a wooden floor",
    "a matte blue cylinder in front of a yellow torus",
    "a large white torus and a small red cube",
    "a small purple cone on a sandy floor under a clear sky",
    "two large red cubes left of a white ball",
    "a brown cylinder under a dark sky",
    "a shiny orange cube",
    "a large cyan ball behind a large pink cone",
    "a small yellow cone, a blue cube and a red ball",
    "a green torus on a green floor",
    "three blue cubes under a grey sky",
    "a large orange cylinder right of a small white cone on a pale floor",
    "a small matte brown ball left of a shiny purple cylinder",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--source", help="such as folder:DIR; default: held-out scenes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipe, judges = Pipeline.load(args.model), {} if args.source else scenes_judges()
    source = open_source(args.source or f"scenes:{ROWS}", size=pipe.size, split="test")
    save_png(args.out / "samples.png", sheet_of_samples(pipe, source, judges))
    if not args.source:
        save_png(args.out / "captions.png", sheet_of_captions(pipe, judges["reader"]))


def sheet_of_samples(pipe: Pipeline, source: Source, judges: dict) -> np.ndarray:
    """Images from all over a source, and samples of their conditions."""
    batch = source.batch(source.drawn(ROWS, 0))
    tools = pipe.tools(pipe.names) | judges
    stored = extract_all(batch["image"], batch["given"], pipe.names, tools)
    kinds = {name: (name,) for name in pipe.names} | {"everything": pipe.names, "nothing": ()}
    columns = {"image": batch["image"]} | {
        title: sample_each(pipe, stored, {name: Use(None) for name in kind})
        for title, kind in kinds.items()
    }
    rows = [{title: images[i] for title, images in columns.items()} for i in range(ROWS)]
    return labelled_sheet(rows, CELL)


def sheet_of_captions(pipe: Pipeline, reader) -> np.ndarray:
    """A sample of each caption; prints the share of it that the reader of facts finds."""
    images = np.concatenate([pipe({"caption": text}, count=1, seed=0) for text in CAPTIONS])
    shares = [reader.agreement(text, image) for text, image in zip(CAPTIONS, images, strict=True)]
    for text, share in zip(CAPTIONS, shares, strict=True):
        print(f"{share:.2f}  {text}")
    print(f"{np.mean(shares):.2f}  of what {len(CAPTIONS)} captions say is found")
    return grid(images.repeat(2, 1).repeat(2, 2), 5)


if __name__ == "__main__":
    main()
