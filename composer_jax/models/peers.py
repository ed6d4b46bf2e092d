"""Our tensors under a peer's names and in its layout, both ways: a walk with transposes.

Modules here are named as in diffusers and transformers, so a name differs in its last word alone,
and where it does not, a short list of regular expressions says how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from composer_jax.models.files import Tensor, Tensors

# (pattern, replacement) pairs of `re.sub`, each applied in turn
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "up_kernel": "weight"}
AXES = {  # our axes in PyTorch's order, by leaf and rank
    ("kernel", 2): (1, 0),  # linear
    ("kernel", 4): (3, 2, 0, 1),  # convolution
    ("up_kernel", 4): (2, 3, 0, 1),  # transposed convolution
}


def peer_name(name: str, rules: Rules = ()) -> str:
    """A tensor's name in the peer's file."""
    *module, leaf = name.split(".")
    name = ".".join([*module, LEAVES.get(leaf, leaf)])
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_peer(tensors: Tensors, rules: Rules = ()) -> dict[str, Tensor]:
    """Our tensors as the peer's, in the same order; nothing is read."""
    return {
        peer_name(name, rules): tensor.apply(partial(np.transpose, axes=_axes(name, tensor.shape)))
        for name, tensor in tensors.items()
    }


def from_peer(
    wanted: Mapping[str, Tensor], tensors: Tensors, where: str, rules: Rules = (), ignore: str = ""
) -> dict[str, Tensor]:
    """The peer's `tensors` as ours, under the names of `wanted`; nothing is read.

    `wanted` gives our names and shapes (`files.module_tensors` of an abstract module); `ignore` is
    a regular expression on the peer's names. Strict: raises ValueError naming a tensor that is
    missing, surplus or mis-shaped, by the peer's name and shape.
    """
    ours = {}
    for name, peer in ((name, peer_name(name, rules)) for name in wanted):
        shape = wanted[name].shape
        axes = _axes(name, shape)
        expected = tuple(shape[axis] for axis in axes)
        if peer not in tensors:
            raise ValueError(f"{where} lacks the tensor {peer} {list(expected)}")
        found = tensors[peer].shape
        if _dense(found) != _dense(expected):
            raise ValueError(
                f"{where}: tensor {peer} is {list(found)}, the model wants {list(expected)}"
            )
        ours[name] = tensors[peer].apply(partial(_restore, shape=expected, axes=axes))
    known = {peer_name(name, rules) for name in wanted}
    for peer, tensor in tensors.items():
        if peer not in known and not (ignore and re.fullmatch(ignore, peer)):
            shape = list(tensor.shape)
            raise ValueError(f"{where} has a tensor that the model lacks: {peer} {shape}")
    return ours


def _axes(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return AXES.get((name.rsplit(".", 1)[-1], len(shape)), tuple(range(len(shape))))


def _restore(array: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape).transpose(np.argsort(axes))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer's shape is that of a 1 x 1 convolution: some peers write one as the other."""
    return shape[:2] if shape[2:] == (1, 1) else shape
