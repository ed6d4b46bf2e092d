"""Caption: texts in, CLIP's words and sentence out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_jax.conditions import base
from composer_jax.conditions.features import packed

CAPTION = base.get("caption")


class LetterClip:
    """A CLIP whose tokens are letters and whose image embedding is fixed."""

    sizes = {"text_length": 6, "text_width": 2, "embed_width": 3}  # noqa: RUF012

    def text(self, texts):
        ids = np.zeros((len(texts), 6), np.int32)
        for i, text in enumerate(texts):
            codes = [ord(letter) % 97 for letter in text[:6]]
            ids[i, : len(codes)] = codes
        tokens = np.stack([np.sin(ids), np.cos(ids)], axis=-1).astype(np.float32)
        vector = np.stack([ids.sum(1), ids.max(1) + 1, 0 * ids[:, 0]], axis=-1).astype(np.float32)
        return {
            "ids": ids,
            "tokens": tokens,
            "vector": vector / np.linalg.norm(vector, axis=1, keepdims=True),
        }

    def image(self, images):
        return np.tile(np.float32([[0, 1, 0]]), (len(images), 1))


CLIP = LetterClip()
IMAGES = np.zeros((2, 4, 5, 3), np.uint8)


def test_given_captions_are_encoded():
    stored = CAPTION.extract(IMAGES, {"caption": ["a cat", "dogs"]}, CLIP)
    assert stored["text"] == ["a cat", "dogs"]
    for name, feature in CAPTION.feature.items():
        if name != "text":
            shape = tuple(CLIP.sizes[size] for size in feature.shape)
            assert stored[name].shape == (2, *shape) and stored[name].dtype == feature.dtype
    one = CAPTION.parse("dogs", CLIP)
    assert one["text"] == "dogs"
    np.testing.assert_array_equal(one["tokens"], stored["tokens"][1])
    value = CAPTION.value(one)
    assert set(value) == set(CAPTION.parts)
    np.testing.assert_array_equal(value["vector"], stored["vector"][1])


def test_absence_is_the_empty_caption():
    absent = CAPTION.absent(CLIP)
    assert absent["text"] == ""
    np.testing.assert_array_equal(absent["tokens"], CLIP.text([""])["tokens"][0])


def test_measure_is_the_cosine_with_the_image():
    wanted = CAPTION.parse("zebra", CLIP)
    assert CAPTION.measure(wanted, IMAGES[0], CLIP) == pytest.approx(wanted["vector"][1])


def test_blend_keeps_the_sentence_on_the_sphere():
    a, b = (CAPTION.value(CAPTION.parse(text, CLIP)) for text in ("a", "zzz"))
    middle = CAPTION.blend(a, b, 0.3)
    assert np.linalg.norm(middle["vector"]) == pytest.approx(1.0)
    np.testing.assert_allclose(
        middle["tokens"], 0.7 * a["tokens"] + 0.3 * b["tokens"], rtol=1e-5, atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_rendered(text):
    picture = CAPTION.render({"text": text})
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize(
    "text", ["a", "a large red cone left of a blue ball " * 6, "x" * 200, "word\n\tother " * 20]
)
def test_rendered_text_stays_on_the_page(text):
    picture = CAPTION.render({"text": text})
    assert picture.min() < 128
    for margin in (picture[:8], picture[-8:], picture[:, :8], picture[:, -8:]):
        assert np.all(margin == 255)
    assert np.all(CAPTION.render({"text": " "}) == 255)


def test_mistakes_end_in_one_clear_line():
    cases = {
        "caption needs texts given by the source": (None, CLIP),
        "1 texts for 2 images": ({"caption": ["a"]}, CLIP),
        "caption needs a CLIP": ({"caption": ["a", "b"]}, None),
    }
    for message, (given_, tool) in cases.items():
        with pytest.raises(ValueError, match=message):
            CAPTION.extract(IMAGES, given_, tool)
    with pytest.raises(ValueError, match="takes a sentence"):
        CAPTION.parse(np.zeros(3), CLIP)
    for use in (CAPTION.parse, lambda text: CAPTION.measure({"vector": np.ones(3)}, IMAGES[0])):
        with pytest.raises(ValueError, match="caption needs a CLIP"):
            use("a cat")


def test_sentences_come_from_files_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\n")
    stored = CAPTION.parse("a cat", CLIP)
    np.save(tmp_path / "a.npy", packed(stored))
    for source in (tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path / "a.npy", stored):
        for key, value in CAPTION.parse(source, CLIP).items():
            np.testing.assert_array_equal(value, stored[key])
    np.testing.assert_array_equal(CAPTION.parse(tmp_path / "a.npy")["tokens"], stored["tokens"])
    assert CAPTION.parse("a cat on a photo.png", CLIP)["text"] == "a cat on a photo.png"


def test_what_is_no_sentence_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a photo.png").write_bytes(b"")
    np.save(tmp_path / "vector.npy", np.zeros(3))
    short = {"ids": np.zeros(6), "tokens": np.zeros((6, 2)), "vector": np.zeros(4)}
    for source, message in {
        str(tmp_path / "a photo.png"): "is no sentence; give the words, a .txt or the .npy",
        "caption.png": "caption.png is no sentence",
        "nothing.txt": "nothing.txt cannot be read",
        "nothing.npy": "nothing.npy does not exist",
        str(tmp_path / "latin.txt"): "no text in UTF-8",
        str(tmp_path / "vector.npy"): "vector.npy (holds no caption|is no sentence)",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            CAPTION.parse(source, CLIP)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"caption's vector has shape \[4\]; \[3\] is wanted"):
        CAPTION.parse(short, CLIP)
