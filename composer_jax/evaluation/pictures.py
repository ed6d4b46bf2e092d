"""Pictures for people: grids, contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

CELL, GAP, LINE = 192, 6, 18


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 [N, H, W, 3] as one picture, row by row."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows, columns, height + 2, width + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        sheet[i // columns, i % columns, :height, :width] = image
    return sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 2), columns * (width + 2), 3)


def labelled_sheet(rows: Sequence[Mapping[str, np.ndarray]], cell: int = CELL) -> np.ndarray:
    """Rows of named pictures (uint8, any size) as one sheet, a column for each name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    width = len(names) * (cell + GAP) + GAP
    height = LINE + len(rows) * (cell + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        x = GAP + column * (cell + GAP)
        draw.text((x, 3), name, fill="black")
        for i, row in enumerate(rows):
            if name in row:
                picture = Image.fromarray(row[name])
                method = Image.Resampling.NEAREST if max(picture.size) <= cell // 2 else None
                scale = cell / max(picture.size)
                size = tuple(max(1, round(side * scale)) for side in picture.size)
                sheet.paste(picture.resize(size, method), (x, LINE + GAP + i * (cell + GAP)))
    return np.asarray(sheet)
