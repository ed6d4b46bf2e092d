"""KID, CMMD and Frechet's distance against published implementations, on random features."""

import clip_mmd.calculation
import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from composer_jax.evaluation.quality import cmmd, effnet_features, frechet, kid


@pytest.fixture(scope="module", params=[(64, 16), (300, 48)])
def features(request):
    count, width = request.param
    random = np.random.default_rng(count)
    return random.standard_normal((count, width)), 1.3 * random.standard_normal(
        (count, width)
    ) + 0.2


def test_kid_is_torchmetrics(features):
    """float64: 1e-9."""
    found = poly_mmd(*map(torch.from_numpy, features))
    assert kid(*features) == pytest.approx(float(found), rel=1e-9)


def test_frechet_is_torchmetrics(features):
    """float64: 1e-6."""
    a, b = ((torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T))) for x in features)
    assert frechet(*features) == pytest.approx(float(_compute_fid(*a, *b)), rel=1e-6)


def test_cmmd_is_clip_mmds(features):
    """float64, on unit vectors: 1e-9 absolute, of values times 1000."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    assert cmmd(*features) == pytest.approx(float(clip_mmd.calculation.mmd(*unit)), abs=1e-9)


def test_effnets_features_know_photos():
    """Two crops of one photo are nearer to each other than to another photo."""
    import skimage.data

    cat, coffee = skimage.data.cat(), skimage.data.coffee()
    images = np.stack([cat[:256, :256], cat[20:276, 30:286], coffee[:256, :256]])
    found = effnet_features()(images)
    assert found.shape == (3, 1280)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.1
