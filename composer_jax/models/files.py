"""A model's files: tensors read one by one and checked, written as a stream; pickles refused.

Only JSON and safetensors are read here, and only from inside the directory that was named.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax.utils.atomic import new_file

FORMAT = 1  # of our own directories
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
    "F8_E4M3": jnp.dtype("float8_e4m3fn"),
    "F8_E5M2": jnp.dtype("float8_e5m2"),
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
CHECKSUMS = "crc32"  # key of a file's metadata: checksum by tensor, in what we write
LARGEST = 65504  # float16's: what is beyond, in networks that run in half precision, is damage
MAX_JSON = 2**24  # bytes of a model's JSON
OTHERS = {  # what is taken for safetensors, by its first bytes
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull gets it)",
    b"PK\x03\x04": "a pickle of PyTorch by another name",
    b"\x80": "a pickle by another name",
    b"GGUF": "a GGUF file, which is not read",
    b"\x89HDF": "an HDF5 file",
    b"<": "a web page",
}


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of an array, and how to get it. `read` raises ValueError where it cannot.

    `read_part(index)`: the same as `read()[index]`, where a part can be had for less.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_part: Callable[[tuple[slice, ...]], np.ndarray] | None = None

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """`read()[index]`, and no more than that is made where `read_part` is there."""
        return self.read_part(index) if self.read_part else self.read()[index]

    def apply(self, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """The same through `change`, which may move axes and shape, called when it is read."""
        shape = change(np.broadcast_to(np.zeros((), np.int8), self.shape)).shape
        return Tensor(shape, self.dtype, lambda: change(self.read()))

    def cast(self, dtype) -> Tensor:
        """The same as another dtype; `read` raises ValueError for a number too large for it."""
        dtype = jnp.dtype(dtype)

        def read() -> np.ndarray:
            with np.errstate(over="ignore"):
                array = self.read().astype(dtype)
            if not np.isfinite(array).all():
                raise ValueError(f"a tensor {list(self.shape)} holds numbers too large for {dtype}")
            return array

        return Tensor(self.shape, dtype, read)


Tensors = Mapping[str, Tensor]


def member(root: Path, name: str) -> Path:
    """The file `name` of the model directory `root`, which no link may lead out of.

    In a hub's cache files are links into the `blobs` of the same repository, which is allowed.
    Raises ValueError otherwise.
    """
    path, home = root / name, root.resolve()
    for parent in root.absolute().parents:
        if parent.name.startswith("models--") and (parent / "blobs").is_dir():
            home = parent.resolve()
    if not path.resolve().is_relative_to(home):
        raise ValueError(f"{path} leads out of its directory, to {path.resolve()}; it is not read")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ValueError naming the file where it is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


@contextmanager
def values_of(path: Path) -> Iterator[None]:
    """What its block raises over values of a JSON file becomes a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is broken: {reason}") from error


def refuse_pickle(path: Path) -> None:
    """Raises ValueError, with the way to convert it, where a file's name says it is a pickle."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; convert it once, where "
            'PyTorch is, by: python -c "import torch, safetensors.torch as s; w = torch.load('
            f"'{path.name}', weights_only=True); w = w.get('state_dict', w); s.save_file("
            f"{{k: v.contiguous() for k, v in w.items()}}, '{path.stem}.safetensors')\""
        )


def is_index(path: Path) -> bool:
    """Whether a file is the index of shards, of a variant ("x.index.fp16.json") or of none."""
    return path.suffix == ".json" and ".index." in path.name


def open_tensors(path: Path, root: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all files that an index names.

    DTYPES can be read; numbers must be finite and no larger than float16's largest. Where the file
    has checksums (ours have) they are verified. Shards must lie in `root`.
    Raises ValueError, one line, for anything missing or broken.
    """
    refuse_pickle(path)
    if is_index(path):
        return _open_shards(path, root or path.parent)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is {_no_safetensors(path)}: {error}") from error
    metadata = header.pop("__metadata__", {})
    try:
        sums = json.loads(metadata.get(CHECKSUMS, "{}"))
    except ValueError as error:
        raise ValueError(f"{path} has broken checksums: {error}") from error
    if CHECKSUMS in metadata and sums.keys() != header.keys():
        raise ValueError(f"{path} is broken: its checksums are of other tensors")
    return {
        name: _on_disk(path, name, entry, 8 + length, sums.get(name))
        for name, entry in header.items()
    }


def _no_safetensors(path: Path) -> str:
    """What a file that cannot be opened seems to be, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    for head, what in OTHERS.items():
        if start[8:9] != b"{" and start.lstrip().startswith(head):
            return what
    return "not a whole safetensors file"


def _on_disk(path: Path, name: str, entry: dict, base: int, checksum: int | None) -> Tensor:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])

    def read() -> np.ndarray:
        if dtype is None:
            allowed = ", ".join(DTYPES)
            raise ValueError(f"{path}: tensor {name} is {entry['dtype']}; allowed: {allowed}")
        raw = np.fromfile(path, np.uint8, stop - start, offset=base + start)
        if raw.size != stop - start:
            raise ValueError(f"{path}: tensor {name} ends early")
        if checksum is not None and zlib.crc32(raw) != checksum:
            raise ValueError(f"{path} is broken: tensor {name} is not what was written")
        array = raw.view(dtype).reshape(shape)
        if not _plausible(array):
            raise ValueError(
                f"{path}: tensor {name} holds numbers that are not finite, or beyond {LARGEST}"
            )
        return array

    return Tensor(shape, dtype, read)


def _plausible(array: np.ndarray) -> bool:
    """Whether all numbers are finite and within LARGEST.

    Without their sign, the bits of floats are in the floats' order, and those of NaN above all.
    """
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    largest = min(LARGEST, float(jnp.finfo(array.dtype).max))
    limit = np.asarray([largest], array.dtype).view(bits.dtype)[0]
    return not array.size or (bits & (np.iinfo(bits.dtype).max >> 1)).max() <= limit


def _open_shards(index: Path, root: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    shards = {}
    for file in sorted(set(map(str, places.values()))):
        if Path(file).name != file:
            raise ValueError(f"{index}: shard {file!r} is no file beside it")
        member(root, str((index.parent / file).relative_to(root)))
        shards[file] = open_tensors(index.parent / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise ValueError(f"{index} places the tensor {name} in {file}, which lacks it")
    for file, tensors in shards.items():
        for name in tensors:
            if places.get(name) != file:
                raise ValueError(f"{index} does not name the tensor {name} of {file}")
    return {name: shards[file][name] for name, file in places.items()}


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file with checksums, one tensor in memory at a time; the old file, which
    may be what is being read, stays until the new one is whole. Raises `WriteError`."""
    for tensor in tensors.values():
        if tensor.dtype is None:
            tensor.read()  # says why it cannot be
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    sums = dict.fromkeys(tensors, 2**32 - 1)

    def head(sums) -> bytes:
        metadata = {"format": "pt", CHECKSUMS: json.dumps(sums)}
        return json.dumps({"__metadata__": metadata, **header}).encode()

    room = -(-len(head(sums)) // 8) * 8  # no checksum is longer than these
    with new_file(path) as new, new.open("wb") as file:
        file.seek(8 + room)
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.read().astype(tensor.dtype, copy=False))
            raw = array.reshape(-1).view(np.uint8)
            sums[name] = zlib.crc32(raw)
            file.write(raw)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + head(sums).ljust(room))


def in_memory(array) -> Tensor:
    """An array as a `Tensor`; one on a device is fetched when it is read."""
    return Tensor(tuple(array.shape), jnp.dtype(array.dtype), lambda: np.asarray(array))


def module_tensors(module: nnx.Module) -> dict[str, Tensor]:
    """All arrays of a module, or their shapes alone, by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): in_memory(value.get_value()) for path, value in flat}


def dotted(path) -> str:
    """The name of a leaf by its key path: "unet.conv_in.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def on_device(tensor: Tensor, dtype) -> jax.Array:
    """A tensor in memory, in `dtype`. `jnp.asarray` would compile a copy for every shape."""
    return jax.device_put(np.asarray(tensor.read(), dtype))


def fill_module(module: nnx.Module, tensors: Tensors, where: str, dtype=None) -> None:
    """Puts tensors into a module by dotted path, in `dtype` or the module's own.

    Strict: raises ValueError that names a missing, surplus or mis-shaped tensor; nothing is
    half-loaded. `where` names the file in the message.
    """
    state = nnx.state(module)
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    compare({name: tuple(v.shape) for name, v in flat.items()}, tensors, where)
    for name, variable in flat.items():
        variable.set_value(on_device(tensors[name], dtype or variable.dtype))
    nnx.update(module, state)


def compare(wanted: Mapping[str, tuple[int, ...]], tensors: Tensors, where: str) -> None:
    """Raises ValueError naming a tensor that `where` lacks, has too much, or has mis-shaped."""
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"{where} lacks the tensor {name} {list(shape)}")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise ValueError(f"{where}: tensor {name} is {found}, the model wants {list(shape)}")
    for name in tensors:
        if name not in wanted:
            shape = list(tensors[name].shape)
            raise ValueError(f"{where} has a tensor that the model lacks: {name} {shape}")
