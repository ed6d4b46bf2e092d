"""Composer's tasks on held-out scenes: `python benchmarks/edits.py [--model DIR] --gallery PNG`.

For every task what should change and what should stay, by the conditions' own measures, on the
sources and on the results; and a picture of the first of them.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.data.sources import open_source
from composer_jax.evaluation.control import extract_all, tool_of
from composer_jax.evaluation.judges import scenes_judges
from composer_jax.sampling import edits
from composer_jax.sampling.picture import Picture
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.utils.png import save_png

SHOWN, CELL, LABEL = 4, 96, 118
SCENES = {"red": "blue", "blue": "yellow", "green": "red", "yellow": "green", "purple": "orange"}


class Study:
    """Held-out scenes, everything known of them, and each one's neighbour as the other image."""

    def __init__(self, model: str | None, count: int, steps: int):
        self.pipe = Pipeline.load(model)
        self.tools = self.pipe.tools(self.pipe.names) | scenes_judges()
        self.count = count
        source = open_source(f"scenes:{count + 1}", size=self.pipe.size, split="test")
        batch = source.batch(range(count + 1))
        self.images = batch["image"]
        self.stored = extract_all(self.images, batch["given"], self.pipe.names, self.tools)
        known = ("caption", "depth", "instances")
        self.pictures = [
            Picture(self.pipe, image, {name: one[name] for name in known}, self.tools)
            for image, one in zip(self.images, self.stored, strict=True)
        ]
        self.judges = {
            name: conditions.get(name).judge([one[name] for one in self.stored])
            for name in self.pipe.names
        }
        self.options = {"steps": steps, "batch": 1, "count": 1}

    def score(self, name: str, wanted: list, images) -> float:
        """The mean of a condition's measure; NaN where it does not apply is left out."""
        tool = tool_of(name, self.tools)
        scores = [self.judges[name](w, i, tool) for w, i in zip(wanted, images, strict=False)]
        return float(np.nanmean(scores))

    def own(self, name: str, shift: int = 0) -> list:
        """Each scene's condition, or its neighbour's (`shift` 1)."""
        return [one[name] for one in self.stored[shift : shift + self.count]]

    def object(self, i: int) -> np.ndarray:
        """The largest object of scene i: bool [H, W]."""
        ids = self.stored[i]["instances"]["ids"]
        return ids == 1 + np.argmax([np.sum(ids == k) for k in range(1, ids.max() + 1)])

    def around(self, i: int) -> np.ndarray:
        """The region of that object, a little wider."""
        return binary_dilation(self.object(i), iterations=2).astype(np.float32)

    def mirrored(self, i: int) -> dict:
        """Scene i's instances, mirrored."""
        return {**self.stored[i]["instances"], "ids": self.stored[i]["instances"]["ids"][:, ::-1]}

    def renamed(self, i: int) -> str:
        """Scene i's caption with other colours."""
        words = str(self.stored[i]["caption"]["text"]).split()
        return " ".join(SCENES.get(word, word) for word in words)


def tasks(study: Study) -> dict:
    """Task -> (function of a scene's number, what should change, what should stay).

    What is measured: (condition, wanted); ("outside", None) is the mean difference of pixels
    outside the edited region, in units of 1/255.
    """
    pipe, pictures, options, own = study.pipe, study.pictures, study.options, study.own
    rng = range(study.count)
    captions = [pipe.stored("caption", study.renamed(i)) for i in rng]
    mirrored_depth = [depth[:, ::-1] for depth in own("depth")]
    return {
        "variation": (
            lambda i: edits.variation(pipe, pictures[i], **options),
            [],
            [("palette", own("palette")), ("semantics", own("semantics"))],
        ),
        "reconfiguration": (
            lambda i: edits.reconfiguration(
                pipe, pictures[i], {"palette": own("palette", 1)[i]}, **options
            ),
            [("palette", own("palette", 1))],
            [("depth", own("depth")), ("sketch", own("sketch"))],
        ),
        "region-edit": (
            lambda i: edits.region_edit(
                pipe, pictures[i], study.around(i), given={"caption": captions[i]}, **options
            ),
            [("caption", captions)],
            [("depth", own("depth")), ("outside", None)],
        ),
        "colourisation": (
            lambda i: edits.colourisation(pipe, pictures[i], own("palette", 1)[i], **options),
            [("palette", own("palette", 1))],
            [("intensity", own("intensity"))],
        ),
        "style-transfer": (
            lambda i: edits.style_transfer(pipe, pictures[i], pictures[i + 1], **options),
            [("palette", own("palette", 1)), ("semantics", own("semantics", 1))],
            [("depth", own("depth")), ("sketch", own("sketch"))],
        ),
        "translation": (
            lambda i: edits.translation(pipe, pictures[i], captions[i], **options),
            [("caption", captions)],
            [("depth", own("depth")), ("sketch", own("sketch"))],
        ),
        "pose-transfer": (
            lambda i: edits.pose_transfer(pipe, pictures[i], study.mirrored(i), **options),
            [("depth", mirrored_depth)],
            [("semantics", own("semantics")), ("palette", own("palette"))],
        ),
        "try-on": (
            lambda i: edits.try_on(
                pipe,
                pictures[i],
                pictures[i + 1],
                study.around(i),
                garment_region=study.object(i + 1).astype(np.float32),
                **options,
            ),
            [("semantics", own("semantics", 1))],
            [("outside", None)],
        ),
        "image-to-image": (
            lambda i: edits.image_to_image(
                pipe, pictures[i], strength=0.8, given={"caption": captions[i]}, **options
            ),
            [("caption", captions)],
            [("depth", own("depth"))],
        ),
        "inpainting": (
            lambda i: edits.inpainting(pipe, pictures[i], study.around(i), **options),
            [],
            [("outside", None)],
        ),
    }


TWO = ("reconfiguration", "colourisation", "style-transfer", "try-on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--count", type=int, default=16, help="scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gallery", type=Path, help="a picture to write, a row for each task")
    args = parser.parse_args()
    study = Study(args.model, args.count, args.steps)
    sources, rows = study.images[: args.count], {}
    print(f"{args.count} held-out scenes, {args.steps} steps; each from the source to the result")
    for name, (edit, changes, stays) in tqdm(tasks(study).items(), unit="task"):
        made = np.concatenate([edit(i) for i in range(args.count)])
        cells = []
        for what, ones in (("changes", changes), ("stays", stays)):
            for condition, wanted in ones:
                if condition == "outside":
                    gap = [
                        np.abs(m.astype(float) - s)[study.around(i) == 0].mean()
                        for i, (m, s) in enumerate(zip(made, sources, strict=True))
                    ]
                    cells.append(f"{what}: outside +- {np.mean(gap):.2f}")
                    continue
                before, after = (study.score(condition, wanted, x) for x in (sources, made))
                cells.append(f"{what}: {condition} {before:.2f} to {after:.2f}")
        tqdm.write(f"{name:16}" + "   ".join(cells))
        rows[name] = [
            (study.images[i], *((study.images[i + 1],) if name in TWO else ()), made[i])
            for i in range(min(SHOWN, args.count))
        ]
    way = edits.interpolation(study.pipe, *study.pictures[:2], **study.options | {"count": 8})
    rows["interpolation"] = [(frame,) for frame in way]
    if args.gallery:
        save_png(args.gallery, picture(rows))


def picture(rows: dict) -> np.ndarray:
    """A row for each task: its name, then groups of the images that went in and the result."""
    width = LABEL + max(sum(len(g) * CELL + 8 for g in groups) for groups in rows.values())
    sheet = Image.new("RGB", (width, len(rows) * (CELL + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, groups) in enumerate(rows.items()):
        x, y = LABEL, r * (CELL + 6)
        draw.text((4, y + CELL // 2 - 6), name, fill="black")
        for group in groups:
            for k, image in enumerate(group):
                cell = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)
                sheet.paste(cell, (x, y))
                if k == len(group) - 1 and len(group) > 1:
                    draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="#c1121f", width=2)
                x += CELL
            x += 8
    return np.asarray(sheet)


if __name__ == "__main__":
    main()
