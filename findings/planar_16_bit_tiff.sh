#!/usr/bin/env bash
# Pillow and OpenCV decode a planar 16-bit RGB TIFF to wrong pixels, with no error.
#
# Versions: pillow 13.0.0, opencv-python-headless 5.0.0.93, tifffile 2026.3.3, numpy 2.4.1.
# First guess: an uncompressed TIFF with PlanarConfiguration 2 decodes as the interleaved one does
# (Pillow keeps the high byte of each sample), or it is refused.
# Seen: tifffile reads back what it wrote; 8-bit planar and 16-bit interleaved files are right in
# both; of the 16-bit planar file each gets 1 % of the samples right.
# The script fails where any of the four kinds of file decodes otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pillow==13.0.0 opencv-python-headless==5.0.0.93 tifffile==2026.3.3 numpy==2.4.1
cat > "$folder/decode.py" <<'PY'
import sys

import cv2
import numpy as np
import PIL.Image
import tifffile

path = sys.argv[1] + "/image.tif"
for dtype in (np.uint8, np.uint16):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7, 3)).astype(dtype)
    high = (pixels >> 8 * (pixels.itemsize - 1)).astype(np.uint8)
    for planar in (False, True):
        stored = pixels.transpose(2, 0, 1) if planar else pixels
        kind = "separate" if planar else "contig"
        tifffile.imwrite(path, stored, photometric="rgb", planarconfig=kind)
        assert np.array_equal(tifffile.imread(path), stored)
        opencv = np.mean(cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., ::-1] == pixels)
        pillow = np.mean(np.asarray(PIL.Image.open(path)) == high)
        print(f"{dtype.__name__} {kind}: right in OpenCV {opencv:.0%}, in Pillow {pillow:.0%}")
        if planar and dtype is np.uint16:
            assert opencv < 0.1 and pillow < 0.1, "the planar 16-bit file decodes otherwise"
        else:
            assert opencv == pillow == 1, "a file that was decoded right is not"
PY
"$folder/venv/bin/python" "$folder/decode.py" "$folder"
