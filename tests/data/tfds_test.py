"""TFDS: which feature is the image and which its caption is never drawn by lot."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from composer_jax.conditions.image import decode_image
from composer_jax.data.sources import open_source
from composer_jax.data.tfds import choose
from tests.png import png as png_with


def png(seed):
    image = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def linear():
    """`png(2)`, whose file says that its levels are linear light."""
    levels = np.asarray(Image.open(io.BytesIO(png(2))))
    return png_with(levels, gAMA=(100_000).to_bytes(4, "big"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small dataset of TFDS, as array_record."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from composer_jax.data.tensorflow import tfds

    folder, library = tmp_path_factory.mktemp("tfds") / "tiny" / "1.0.0", tfds()
    folder.mkdir(parents=True)
    image = library.features.Image(shape=(24, 24, 3))
    label = library.features.ClassLabel(names=["red_cone", "blue_ball"])
    features = library.features.FeaturesDict({"picture": image, "label": label})
    writer = ArrayRecordWriter(
        str(folder / "tiny-test.array_record-00000-of-00001"), "group_size:1"
    )
    for i in range(5):
        label = -1 if i == 4 else i % 2  # -1 where nobody labelled it
        example = {"picture": io.BytesIO(linear() if i == 2 else png(i)), "label": label}
        writer.write(features.serialize_example(example))
    writer.close()
    features.save_config(str(folder))
    split = {"name": "test", "numBytes": "1", "shardLengths": ["5"],
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}  # fmt: skip
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds_gives_images_and_labels_as_captions(dataset, caplog):
    source = open_source(f"tfds:{dataset}:test", size=24)
    found = source.batch(range(len(source)))
    assert found["given"]["caption"] == ["red cone", "blue ball"] * 2 + [""]
    assert source.fields == {"image": "picture", "caption": "label"} and "picture" in source.key
    assert "1 of 5 images have no caption: example 4" in caplog.text
    wanted = np.asarray(Image.open(io.BytesIO(png(3))))
    np.testing.assert_array_equal(found["image"][3], wanted)
    np.testing.assert_array_equal(found["image"][2], decode_image(linear(), "as anywhere"))
    assert np.any(found["image"][2] != np.asarray(Image.open(io.BytesIO(png(2)))))
    with pytest.raises(ValueError, match="one of its splits"):
        open_source(f"tfds:{dataset}:train", size=24)
    with pytest.raises(ValueError, match="source tfds:no_such_dataset"):
        open_source("tfds:no_such_dataset", size=24)


@pytest.fixture(scope="module")
def kinds():
    """The library's features, and one of each kind by a letter."""
    from composer_jax.data.tensorflow import tfds

    library = tfds().features
    return library, {
        "i": library.Image(),
        "m": library.LabeledImage(labels=3, shape=(None, None, 1)),
        "l": library.ClassLabel(names=["a", "b"]),
        "t": library.Text(),
        "n": library.Tensor(shape=(), dtype=np.int64),
        "s": library.Sequence(library.Text()),
        "d": library.Sequence({"text": library.Text(), "id": library.Scalar(np.int64)}),
    }


@pytest.mark.parametrize(
    ("features", "supervised", "asked", "wanted"),
    [
        ("image:i mask:i label:l species:l", None, "", "image label"),
        ("image:i mask:i label:l species:l", ("mask", "species"), "", "mask species"),
        ("photo:i seg:m label:l", ("photo", "seg"), "", "photo label"),
        ("photo:i seg:m breed:l", None, "", "photo breed"),
        ("image:i a:l b:l", ("image", {"x": "b"}), "", "image b"),
        ("image:i label:l caption:t", ("image", "label"), "", "image caption"),
        ("image:i label:l caption:n", None, "", "image label"),
        ("image:i captions:d id:n", None, "", "image captions"),
        ("image:i captions:s", None, "", "image captions"),
        ("image:i words:t", ("image", "words"), "", "image words"),
        ("image:i", None, "", "image None"),
        ("a:i b:i x:l y:l", None, "image=b caption=x", "b x"),
        ("image:i label:l words:t", None, "caption=words", "image words"),
    ],
)
def test_features_are_chosen_by_what_the_dataset_says(kinds, features, supervised, asked, wanted):
    library, of_kind = kinds
    features = {name: of_kind[kind] for name, kind in (f.split(":") for f in features.split())}
    asked = dict(one.split("=") for one in asked.split())
    reverse = {name: features[name] for name in reversed(features)}
    for given in (features, reverse, library.FeaturesDict(features)):
        chosen = choose(library, given, supervised, asked)
        assert f"{chosen['image']} {chosen['caption']}" == wanted


@pytest.mark.parametrize(
    ("features", "asked", "message"),
    [
        ("b:i a:i", "", "which is the image: a, b\\? Say #image=a or another"),
        ("image:i y:l x:l", "", "which is the caption: x, y\\? Say #caption=x"),
        ("label:l", "", "it has no image; it has label"),
        ("image:i label:l", "caption=lable", "there is no caption 'lable' .did you mean 'label'"),
        ("image:i label:l", "image=label", "'label' is no image; images are image"),
        ("image:i seen:i", "caption=seen", "'seen' is an image, and no caption"),
    ],
)
def test_what_decides_nothing_is_refused_with_the_candidates(kinds, features, asked, message):
    library, of_kind = kinds
    features = {name: of_kind[kind] for name, kind in (f.split(":") for f in features.split())}
    with pytest.raises(ValueError, match=message):
        choose(library, features, None, dict(one.split("=") for one in asked.split()))


def test_features_can_be_named(dataset):
    source = open_source(f"tfds:{dataset}:test#image=picture,caption=label", size=24)
    assert source.batch([1])["given"]["caption"] == ["blue ball"]
    for wrong, message in {
        "#img=a": "'img'",
        "#image=": "image",
        "#image=picture,image=picture": "names a field twice",
        "#image=x": "no image 'x'",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(f"tfds:{dataset}:test{wrong}", size=24)
