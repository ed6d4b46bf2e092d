"""Semantics: an image or an embedding in, an embedding of unit length out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from composer_jax.conditions import base

SEMANTICS = base.get("semantics")


class ColourClip:
    """A CLIP whose embedding of an image is its mean colour."""

    sizes = {"text_length": 4, "text_width": 2, "embed_width": 3}  # noqa: RUF012

    def image(self, images):
        vectors = np.stack([np.float32(image).mean(axis=(0, 1)) + 1.0 for image in images])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


CLIP = ColourClip()
RED = np.full((5, 3, 3), [200, 0, 0], np.uint8)


def test_extract_and_measure_are_clips():
    images = np.stack([RED, RED[..., ::-1]])
    stored = SEMANTICS.extract(images, tool=CLIP)
    np.testing.assert_array_equal(stored, CLIP.image(images))
    assert SEMANTICS.measure(stored[0], images[0], CLIP) == pytest.approx(1.0)
    assert SEMANTICS.measure(stored[0], images[1], CLIP) < 0.1
    assert SEMANTICS.value(stored[0])["vector"].shape == (3,)


def test_parse_takes_an_image_or_an_embedding(tmp_path):
    Image.fromarray(RED).save(tmp_path / "red.png")
    np.save(tmp_path / "vector.npy", np.float64([3.0, 0.0, 4.0]))
    np.save(tmp_path / "image.npy", RED)
    expected = CLIP.image([RED])[0]
    for source in (tmp_path / "red.png", str(tmp_path / "red.png"), RED, tmp_path / "image.npy"):
        np.testing.assert_array_equal(SEMANTICS.parse(source, CLIP), expected)
    for tool in (CLIP, None):
        np.testing.assert_allclose(SEMANTICS.parse(tmp_path / "vector.npy", tool), [0.6, 0, 0.8])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 3, 4]))
def test_parse_takes_images_of_any_size_and_kind(height, width, channels):
    vector = SEMANTICS.parse(np.zeros((height, width, channels), np.uint8), CLIP)
    assert np.linalg.norm(vector) == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 900), st.integers(0, 9))
def test_render_shows_every_number(width, seed):
    vector = np.random.default_rng(seed).normal(size=width)
    picture = SEMANTICS.render(vector / np.linalg.norm(vector))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert 128 <= picture.shape[1] <= 256
    assert np.all(SEMANTICS.render(np.zeros(width)) == 255)


def test_blend_goes_along_the_sphere():
    a, b = (SEMANTICS.value(np.eye(3, dtype=np.float32)[i]) for i in (0, 1))
    np.testing.assert_allclose(
        SEMANTICS.blend(a, b, 0.5)["vector"], [np.sqrt(0.5), np.sqrt(0.5), 0], atol=1e-6
    )


def test_mistakes_end_in_one_clear_line(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    np.save(tmp_path / "long.npy", np.ones(7))
    cases = {
        "text.png": (str(tmp_path / "text.png"), CLIP),
        "nowhere.npy": (str(tmp_path / "nowhere.npy"), CLIP),
        "long.npy has 7 numbers; this CLIP's embeddings have 3": (tmp_path / "long.npy", CLIP),
        "not all zero": (np.zeros(3), CLIP),
        "^the array is no embedding: finite": (np.array([1.0, np.inf, 0.0]), CLIP),
        "semantics needs a CLIP": (RED, None),
    }
    for message, (source, tool) in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            SEMANTICS.parse(source, tool)
        assert "\n" not in str(error.value)
    for use in (SEMANTICS.extract, lambda images: SEMANTICS.measure(np.ones(3), images[0])):
        with pytest.raises(ValueError, match="semantics needs a CLIP"):
            use(RED[None])
