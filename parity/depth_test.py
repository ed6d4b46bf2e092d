"""Depth networks against transformers, live: the same weights, the same photo, float32."""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

from composer_jax.models.dpt_files import load_dpt

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "layers": 12}
TINY = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 70, "layers": 4}
TINY_NECK = {
    "reassemble_hidden_size": 32,
    "neck_hidden_sizes": [8, 12, 16, 20],
    "fusion_hidden_size": 16,
    "head_hidden_size": 6,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(autouse=True)
def _same_weights_in_every_run():
    torch.manual_seed(0)


def depth_anything(backbone, **options):
    layers = backbone.pop("layers")
    vit = Dinov2Config(
        **backbone,
        num_hidden_layers=layers,
        out_indices=[layers * i // 4 for i in (1, 2, 3, 4)],
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=vit, **options))


def dpt(**options):
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    neck = {"neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
    layers = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "image_size": 96}
    return DPTForDepthEstimation(DPTConfig(**shape, **neck, **layers, **options))


def perturb(model, seed):
    """Moves every parameter far from where it starts; a bias keeps most of the depth above 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            fan = tensor[0].numel() if tensor.ndim in (2, 4) else 25  # a kernel; else a vector
            tensor.add_(torch.randn(tensor.shape, generator=draw) / fan**0.5)
            if name in ("head.conv3.bias", "head.head.4.bias"):
                tensor.fill_(1.0)
    return model.eval()


def compare(model, processor, photo, folder):
    """The relative L2 distance of depth at the photo's size, ours from transformers'."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    network = load_dpt(folder)
    assert network.config.preprocess.shape(*photo.shape[:2]) == tuple(
        processor(photo, return_tensors="np")["pixel_values"].shape[2:]
    )
    with torch.no_grad():
        found = model(**processor(photo, return_tensors="pt"))
    size = [photo.shape[:2]]
    theirs = processor.post_process_depth_estimation(found, size)[0]["predicted_depth"].numpy()
    if network.config.output == "metric":
        theirs = 1 / np.maximum(theirs, 1e-3 * network.config.max_depth)
    ours = network.tool()(photo[None])[0]
    distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    varies = theirs.std() / np.abs(theirs).mean()
    print(f"relative L2 {distance:.1e}; depth varies by {varies:.2f}")
    assert varies > 0.01 and (theirs > 0).mean() > 0.2
    return distance


@pytest.mark.parametrize("photo", ["square", "wide"])
def test_depth_anything_v2_small_end_to_end(photo, tmp_path):
    photo = skimage.data.astronaut() if photo == "square" else skimage.data.coffee()[20:330]
    size = {"height": 518, "width": 518}
    processor = DPTImageProcessor(
        size=size, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3, **IMAGENET
    )
    assert compare(perturb(depth_anything(dict(SMALL)), 0), processor, photo, tmp_path) < 1e-4


@pytest.mark.parametrize("output", [{}, {"depth_estimation_type": "metric", "max_depth": 20}])
def test_tiny_depth_anything_of_any_size(output, tmp_path):
    photo = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((131, 93)))
    size = {"height": 84, "width": 84}
    processor = DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)
    model = perturb(depth_anything(dict(TINY), **TINY_NECK, **output), 1)
    assert compare(model, processor, photo, tmp_path) < 1e-4


@pytest.mark.parametrize("readout", ["project", "add", "ignore"])
@pytest.mark.parametrize("side", [96, 112])
def test_tiny_dpt(readout, side, tmp_path):
    """112 pixels: 7 patches, an odd number, so that maps are fitted and positions resampled."""
    processor = DPTImageProcessor(size={"height": side, "width": side}, resample=2)
    model = perturb(dpt(readout_type=readout), 2)
    assert compare(model, processor, skimage.data.chelsea()[:200], tmp_path) < 1e-4


def test_shards_and_half_precision_are_read(tmp_path):
    model = perturb(dpt(), 3)
    model.to(torch.float16).save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    network = load_dpt(tmp_path)
    theirs = model.state_dict()["dpt.encoder.layer.3.intermediate.dense.weight"].float().numpy()
    ours = network.backbone.layers[3].mlp.fc1.kernel[...]
    np.testing.assert_array_equal(np.asarray(ours).T, theirs)
