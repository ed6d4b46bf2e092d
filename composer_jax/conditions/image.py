"""Image files and arrays in, uint8 RGB out; and the ways to bring photos and maps to a size."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np

from composer_jax.conditions.colour import to_srgb
from composer_jax.conditions.decoding import decode, numbers
from composer_jax.utils.painted import painted


def load_image(source) -> np.ndarray:
    """Reads an image as uint8 RGB [H, W, 3], as a viewer would show it on white paper.

    `source` is a path (also of a .npy) or an array: uint8, uint16, bool or float in [0, 1];
    [H, W], or [H, W, C] with C = 1 (grey), 2 (grey and alpha), 3 or 4 (alpha). EXIF orientation is
    honoured, embedded colour profiles are brought to sRGB (`to_srgb`), transparency lies on white,
    and 16-bit values are rounded to 8 bits. Of several frames the first is read.

    Raises ValueError, one line naming the file, where it is missing, no image, broken, or larger
    than 100 megapixels (refused before it is decoded).
    """
    return on_white(load_rgba(source))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """An image file's bytes as `load_image` gives it; `name` is for errors, which are the same."""
    return on_white(_managed(io.BytesIO(content), name))


def on_white(image_HxWxC: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] on white paper, [H, W, 3]; [H, W, 3] as it is."""
    if image_HxWxC.shape[2] == 3:
        return image_HxWxC
    alpha_HxWx1 = image_HxWxC[..., 3:].astype(np.uint32)
    rgb_HxWx3 = image_HxWxC[..., :3].astype(np.uint32)
    return ((rgb_HxWx3 * alpha_HxWx1 + 255 * (255 - alpha_HxWx1) + 127) // 255).astype(np.uint8)


def load_rgba(source) -> np.ndarray:
    """Reads an image as uint8, [H, W, 4] where it has an alpha channel and [H, W, 3] where not.

    Takes and raises what `load_image` does.
    """
    if not isinstance(source, str | os.PathLike):
        return _from_array(np.asarray(source), "the image")
    if Path(source).suffix.lower() == ".npy":
        return _from_array(load_array(source), str(source))
    return _managed(_existing(source), str(source))


def load_numbers(source) -> np.ndarray:
    """Reads the numbers of an image file as they stand, without colour management: [H, W] or, in
    colour, [H, W, 3]; [H, W, 4] with alpha. dtype: uint8, or what a deeper file holds.

    `source` is a path or an array, which is returned as it is. Raises what `load_image` does.
    """
    if isinstance(source, str | os.PathLike):
        return decode(_existing(source), str(source), numbers)
    return np.asarray(source)


def load_region(source) -> np.ndarray:
    """How white each pixel is painted, float32 [H, W] in [0, 1], of an image file, a .npy file or
    an array.

    White is 1, black and what is transparent 0. Raises what `load_image` and `painted` do.
    """
    if not isinstance(source, str | os.PathLike):
        return painted(source, "the region")
    if Path(source).suffix.lower() == ".npy":
        return painted(load_array(source), str(source))
    array = load_numbers(source)
    if array.dtype.itemsize > 2:
        array = _as_uint16(array) / np.float32(65535.0)
    return painted(array, str(source))


def load_array(path) -> np.ndarray:
    """Reads a .npy file; raises ValueError, one line naming the file, where that fails."""
    try:
        return np.load(_existing(path), allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        if str(path) in str(error):
            raise ValueError(str(error)) from error
        raise ValueError(f"{path} is not a readable .npy file (arrays of plain numbers)") from error


def _existing(path: str | os.PathLike) -> Path:
    if not str(path).strip():
        raise ValueError(f"{str(path)!r} names no file")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a file")
    if not os.path.exists(path):  # where a name is too long, too
        raise ValueError(f"{path} does not exist")
    return Path(path)


def _managed(file, path: str) -> np.ndarray:
    """uint8 [H, W, 3] or, with alpha, [H, W, 4], in sRGB."""
    from PIL import Image

    def finish(image, deep: np.ndarray | None) -> np.ndarray:
        if deep is not None:
            rounded = Image.fromarray(_to_uint8(_as_uint16(deep)))
            rounded.info = {k: v for k, v in image.info.items() if k != "transparency"}
            image = rounded
        return np.array(to_srgb(image))

    return decode(file, path, finish)


def _as_uint16(values: np.ndarray) -> np.ndarray:
    """16-bit grey as it is; wide integers and floats by the smallest usual range they fit in."""
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        largest = values[np.isfinite(values)].max(initial=0)
        top = 1.0 if largest <= 1.0 else 255.0 if largest <= 255.0 else 65535.0
        values = np.rint(np.nan_to_num(values / top, posinf=1.0) * 65535.0)
    return values.clip(0, 65535).astype(np.uint16)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """16 bits to 8, rounded: v x 255 / 65535."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: np.ndarray, what: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4 or 0 in array.shape:
        raise ValueError(f"{what} has shape {array.shape}; allowed are [H, W] and [H, W, 1 to 4]")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _to_uint8(array)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.all(array >= 0.0) and np.all(array <= 1.0)):
            raise ValueError(f"{what} has values outside [0, 1]; float images lie in it")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"{what} is {array.dtype}; allowed are uint8, uint16, bool, float in [0, 1]"
        )
    colour = array[..., :1].repeat(3, axis=2) if array.shape[2] < 3 else array[..., :3]
    alpha = array[..., -1:] if array.shape[2] in (2, 4) else array[..., :0]
    return np.ascontiguousarray(np.concatenate([colour, alpha], axis=2))


def fit_map(array: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """Crops the middle of [H, W] or [H, W, C] to the shape of `size` (h, w) and brings it there.

    `how`: "photo" as `fit_photo` does; "nearest" keeps values as they are (ids); "area" averages
    going down and interpolates going up; "lines" keeps every thin line (0 is the ground), one pixel
    wide. dtype is kept.
    """
    if how == "photo":
        return fit_photo(array, size)
    height, width = size
    if array.shape[:2] == (height, width):
        return array
    (top, left), (tall, wide), scale = _crop(array.shape[:2], size)
    if how == "area":
        return _area(array, size, (left, top, left + wide, top + tall))
    if how == "nearest":
        rows = _cells(top, scale, height, array.shape[0], 0.5)
        columns = _cells(left, scale, width, array.shape[1], 0.5)
        return array[rows[:, None], columns[None, :]]
    if how == "lines":
        return _lines(array, size, (top, left), scale)
    raise ValueError(f"no way {how!r} to change a size; allowed: photo, nearest, area, lines")


def fit_photo(image: np.ndarray, size: tuple[int, int], where: float = 0.5) -> np.ndarray:
    """Crops a photo, uint8 [H, W] or [H, W, 3], to the shape of `size` (h, w) and resizes the crop
    with Lanczos's filter. Training and sampling both see photos through this function.

    `where` the crop lies along the longer side, 0 to 1; 0.5 is the middle.
    """
    from PIL import Image

    (top, left), (tall, wide), _ = _crop(image.shape[:2], size, where)
    first_row, first_column = int(top), int(left)
    rows = slice(first_row, math.ceil(top + tall))
    columns = slice(first_column, math.ceil(left + wide))
    crop = Image.fromarray(np.ascontiguousarray(image[rows, columns]))
    left, top = left - first_column, top - first_row
    box = (left, top, min(left + wide, crop.width), min(top + tall, crop.height))
    way = Image.Resampling.LANCZOS
    return np.array(crop.resize(size[::-1], way, box=box, reducing_gap=3.0))


def fit_region(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops a region, float [H, W], drawn on a photo as `fit_photo` crops that photo for `size`.

    One of the shape of `size` is returned as it is, at any resolution.
    """
    height, width = region.shape
    if height * size[1] == width * size[0]:
        return region
    coarse = height < size[0] or width < size[1]  # its pixels keep their edges
    return fit_map(region, size, "nearest" if coarse else "area")


def _crop(
    shape: tuple[int, ...], size: tuple[int, int], where: float = 0.5
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """The largest part of [H, W] that has the shape of `size`: (top, left), (height, width), and
    how many of its pixels become one.

    Going down it starts at a whole pixel, so that a photo and its maps are cut alike; going up it
    need not, because a pixel of a coarse map may be a large part of the picture.
    """
    scale = min(shape[0] / size[0], shape[1] / size[1])
    tall, wide = (round(side * scale, 6) for side in size)  # 21 / 19 * 19 is beyond 21
    top, left = (shape[0] - tall) * where, (shape[1] - wide) * where
    if scale >= 1.0:
        top, left = float(int(top)), float(int(left))
    return (top, left), (tall, wide), scale


def _cells(start: float, scale: float, count: int, limit: int, at: float) -> np.ndarray:
    """The index that lies `at` (0 = the first edge) of each of `count` cells."""
    cells = np.floor(start + (np.arange(count) + at) * scale + 1e-6).astype(np.int64)
    return cells.clip(0, limit - 1)


def _area(array: np.ndarray, size: tuple[int, int], box: tuple[float, ...]) -> np.ndarray:
    from PIL import Image

    shrinks = box[3] - box[1] >= size[0]
    way = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR

    def resize(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize(size[::-1], way, box=box))

    if array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] == 3):
        return resize(array)
    planes = np.atleast_3d(array).astype(np.float32)
    result = np.stack([resize(planes[..., c]) for c in range(planes.shape[2])], axis=2)
    if np.issubdtype(array.dtype, np.integer):
        result = np.rint(result)
    return result.reshape(*size, *array.shape[2:]).astype(array.dtype)


def _lines(array, size, start: tuple[float, float], scale: float) -> np.ndarray:
    from skimage.morphology import skeletonize

    rows = _cells(start[0], scale, size[0], array.shape[0], 0.0)
    columns = _cells(start[1], scale, size[1], array.shape[1], 0.0)
    bottom, right = (int(np.ceil(start[i] + size[i] * scale - 1e-6)) for i in (0, 1))
    # reduceat takes the maximum from each start to the next; its own value where starts repeat.
    largest = np.maximum.reduceat(array[:bottom, :right], rows, axis=0)
    largest = np.maximum.reduceat(largest, columns, axis=1)
    return np.where(skeletonize(largest > 0), largest, np.zeros_like(largest))
