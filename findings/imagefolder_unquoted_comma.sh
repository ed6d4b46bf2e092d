#!/usr/bin/env bash
# imagefolder reads a metadata.csv whose texts hold an unquoted comma, and drops half of each text.
#
# Versions: datasets 5.2.0, pandas 3.1.1, pillow 13.0.0.
# First guess: under the header text,file_name the row "A cat, on a lawn,a.png" has a field too
# many, so load_dataset raises an error, or the file's name is wrong and the image is not found.
# Seen: where each row has a field too many, pandas takes the first field as the index. The images
# are right, the text is " on a lawn", and "A cat" is in __index_level_0__; no error.
# The script fails where the texts come out otherwise, or the load raises an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pandas==3.1.1 pillow==13.0.0
cat > "$folder/load.py" <<'PY'
import pathlib
import sys

import datasets
from PIL import Image

folder = pathlib.Path(sys.argv[1])
images = folder / "images"
images.mkdir()
for name in ("a.png", "b.png"):
    Image.new("RGB", (4, 4)).save(images / name)
(images / "metadata.csv").write_text(
    "text,file_name\nA cat, on a lawn,a.png\nA dog, in a park,b.png\n"
)
rows = datasets.load_dataset(
    "imagefolder", data_dir=str(images), cache_dir=str(folder / "cache"), split="train"
)
texts, firsts = list(rows["text"]), list(rows["__index_level_0__"])
print(f"datasets {datasets.__version__}: {texts}, {firsts}, image of {rows[0]['image'].size}")
assert texts == [" on a lawn", " in a park"], "the texts come out otherwise"
assert firsts == ["A cat", "A dog"], "the first halves are elsewhere"
PY
"$folder/venv/bin/python" "$folder/load.py" "$folder"
