import subprocess
import sys
import textwrap
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest

import composer_jax.conditions as conditions
from composer_jax.conditions import Condition, Feature, Part, get, names, register
from composer_jax.conditions.base import slerp

pytestmark = pytest.mark.fast

NINTH = """
    import numpy as np
    import jax.numpy as jnp
    from composer_jax.conditions.base import Condition, Feature, Part, register

    class Brightness(Condition):
        name = "{name}"
        doc = "mean brightness"
        parts = {{"vector": Part("vector", (1,))}}
        feature = Feature((1,), "float32", "raw")

        def extract(self, images, given=None, tool=None):
            return images.mean(axis=(1, 2, 3)).astype(np.float32)[:, None] / 255.0

        def value(self, stored):
            return {{"vector": jnp.asarray(stored)}}

        def parse(self, text, tool=None):
            return np.array([float(text)], np.float32)

        def render(self, stored):
            return np.full((8, 8, 3), stored[0] * 255, np.uint8)

        def measure(self, wanted, image, tool=None):
            return 1.0 - abs(float(wanted[0]) - image.mean() / 255.0)

    register(Brightness())
"""


def drop(folder, monkeypatch, name="brightness"):
    (folder / "ninth.py").write_text(textwrap.dedent(NINTH.format(name=name)))
    monkeypatch.setattr(conditions, "__path__", [*conditions.__path__, str(folder)])


class Plain(Condition):
    name = "plain"
    doc = "for these tests"
    parts: Mapping[str, Part] = {
        "vector": Part("vector", ("embed_width",)),
        "map": Part("spatial", (1,)),
    }
    feature: Mapping[str, Feature] = {
        "ids": Feature(("h", "w"), "uint8", "png", "nearest"),
        "text": Feature((), "str", "text"),
    }

    def extract(self, images, given=None, tool=None):
        return {"ids": images[..., 0], "text": ["a"] * len(images)}

    def value(self, stored):
        return {"map": jnp.asarray(stored["ids"], jnp.float32)[..., None]}

    def parse(self, text, tool=None):
        return {"ids": np.zeros((2, 2), np.uint8), "text": text}

    def render(self, stored):
        return np.zeros((2, 2, 3), np.uint8)

    def measure(self, wanted, image, tool=None):
        return 1.0


def test_own_conditions_are_found_and_keep_their_contract():
    found = names()
    assert {"palette", "sketch", "intensity", "mask"} <= set(found)
    assert list(found) == sorted(found)
    for name in found:
        condition = get(name)
        assert condition.name == name and condition.doc and condition.parts
        features = condition.feature
        for feature in features.values() if isinstance(features, dict) else [features]:
            assert feature.codec in ("png", "raw", "text")
            is_map = feature.shape[:2] == ("h", "w")
            assert (feature.resize in ("photo", "nearest", "area", "lines")) == is_map


def test_a_ninth_condition_in_a_folder_on_the_path_is_found_and_goes_with_it(tmp_path, monkeypatch):
    before = names()
    with monkeypatch.context() as patch:
        drop(tmp_path, patch)
        assert names() == tuple(sorted([*before, "brightness"]))
        image = np.full((1, 4, 4, 3), 51, np.uint8)
        assert get("brightness").extract(image) == pytest.approx(0.2)
        assert get("brightness").draw(None, np.ones(1), None)["vector"].shape == (1,)
    assert names() == before
    with pytest.raises(ValueError, match="no condition 'brightness'"):
        get("brightness")


def test_a_file_that_comes_to_a_folder_later_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "__path__", [*conditions.__path__, str(tmp_path)])
    before = names()
    (tmp_path / "ninth.py").write_text(textwrap.dedent(NINTH.format(name="late")))
    assert set(names()) - set(before) == {"late"}


def test_a_file_of_the_same_name_in_another_folder_is_read_anew(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            drop(tmp_path / name, patch, name)
            assert name in names()
            assert get(name).name == name
    assert not {"first", "second"} & set(names())


def test_a_condition_file_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there")
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "__path__", [*conditions.__path__, str(tmp_path)])
        with pytest.raises(ValueError, match=r"conditions\.broken cannot be imported: .*not_there"):
            names()
    assert "palette" in names()


def test_a_taken_name_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        drop(tmp_path, patch, "palette")
        with pytest.raises(ValueError, match="palette is already registered"):
            names()
    assert get("palette").parts["vector"].shape == (156,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Two words"}, "lower-case"),
        ({"keep_probability": 1.5}, r"keep_probability must lie in \[0, 1\]"),
        ({"parts": {"map": Part("spacial", (1,))}}, "did you mean 'spatial'"),
    ],
)
def test_what_the_contract_forbids_is_refused(changes, message):
    bad = type("Bad", (Plain,), changes)
    with pytest.raises(ValueError, match=message):
        register(bad())


def test_an_unknown_name_names_the_likely_one():
    with pytest.raises(ValueError, match=r"no condition 'palete'.*did you mean 'palette'.*sketch"):
        get("palete")


def test_fit_changes_maps_only():
    stored = {"ids": np.arange(48, dtype=np.uint8).reshape(6, 8), "text": "a cone"}
    fitted = Plain().fit(stored, (3, 3))
    assert fitted["text"] == "a cone"
    assert fitted["ids"].shape == (3, 3) and fitted["ids"].dtype == np.uint8
    assert np.isin(fitted["ids"], stored["ids"][:, 1:7]).all()


def test_blend_is_spherical_for_embeddings_and_linear_for_maps():
    a = {"vector": jnp.array([1.0, 0.0]), "map": jnp.zeros((2, 2, 1))}
    b = {"vector": jnp.array([0.0, 3.0]), "map": jnp.ones((2, 2, 1))}
    half = Plain().blend(a, b, 0.5)
    np.testing.assert_allclose(half["vector"], np.sqrt(0.5) * 2.0 * np.ones(2), rtol=1e-5)
    np.testing.assert_allclose(half["map"], 0.5)
    for amount, end in ((0.0, a), (1.0, b)):
        for name, array in Plain().blend(a, b, amount).items():
            np.testing.assert_allclose(array, end[name], atol=1e-6)


def test_slerp_is_finite_where_directions_coincide_oppose_or_vanish():
    a = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    b = jnp.array([[2.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    assert bool(jnp.isfinite(slerp(a, b, 0.3)).all())
    np.testing.assert_allclose(slerp(a, b, 0.5)[0], [1.5, 0.0], rtol=1e-5)


def test_the_registry_imports_no_heavy_library():
    code = """
import sys
import composer_jax.conditions as c
assert {"palette", "sketch", "caption"} <= set(c.names()), c.names()
heavy = {"cv2", "skimage", "scipy", "transformers", "tensorflow", "onnxruntime"} & set(sys.modules)
assert heavy <= {"scipy"}, heavy  # jax itself imports scipy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
