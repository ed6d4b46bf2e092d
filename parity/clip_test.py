"""CLIP against transformers' PyTorch model on random weights that it saved."""

import numpy as np
import pytest
import torch
from skimage import data
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from composer_jax.models.clip import Clip
from composer_jax.storage.models import BUNDLED

TEXTS = ["a small red cone left of a blue ball", "", "two grey cubes " * 40]
TINY = {
    "text_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "max_position_embeddings": 48, "projection_dim": 24},
    "vision_config": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
                      "num_attention_heads": 3, "patch_size": 8, "image_size": 32},
    "projection_dim": 24,
}  # fmt: skip
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
              "num_attention_heads": 12}  # fmt: skip


def off(found, wanted) -> float:
    """Relative L2."""
    wanted = wanted.detach().numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module", params=["quick_gelu", "gelu", "large"])
def peer(request, tmp_path_factory):
    """A CLIP of random weights, saved by transformers with the bundled vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "clip")
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    large = request.param == "large"  # the exact text tower of ViT-L/14
    act = {"hidden_act": "quick_gelu" if large else request.param}
    config = CLIPConfig(
        text_config=TINY["text_config"] | (LARGE_TEXT if large else {}) | ids | act,
        vision_config=TINY["vision_config"] | act,
        projection_dim=TINY["projection_dim"],
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("backend", ["nnx", "flax"])
def test_words_sentences_and_images(peer, backend):
    model, folder = peer
    processor, photos = CLIPImageProcessor.from_pretrained(folder), [data.coffee(), data.chelsea()]
    for skip in (0, 1):
        ours = Clip.load(folder, backend=backend, skip=skip)
        found, pictures = ours.text(TEXTS), ours.image(photos)
        with torch.no_grad():
            ids = torch.from_numpy(found["ids"]).long()
            text = model.text_model(ids, output_hidden_states=True)
            words = model.text_model.final_layer_norm(text.hidden_states[-1 - skip])
            sentence = model.text_projection(text.pooler_output)
            pixels = processor(photos, return_tensors="pt").pixel_values
            image = model.get_image_features(pixels)
        assert off(found["tokens"], words) < 1e-5
        assert off(found["vector"], sentence / sentence.norm(dim=-1, keepdim=True)) < 1e-5
        assert off(pictures, image / image.norm(dim=-1, keepdim=True)) < 1e-5


def test_token_ids_and_pixels(peer):
    _, folder = peer
    ours = Clip.load(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    wanted = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=48)["input_ids"]
    np.testing.assert_array_equal(ours.tokenize(TEXTS), wanted)
    processor = CLIPImageProcessor.from_pretrained(folder)
    for photo in (data.coffee(), data.chelsea(), data.astronaut(), data.rocket()):
        pixels = processor(photo, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        found = np.asarray(ours.preprocess.pixels(ours.preprocess.resize(photo)[None]))[0]
        np.testing.assert_allclose(found, pixels, atol=1e-5)


def test_what_we_save_is_what_transformers_loads(peer, tmp_path):
    model, folder = peer
    Clip.load(folder).save(tmp_path)
    again = CLIPModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
