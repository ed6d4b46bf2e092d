"""Packed sources: tar files and TFDS give what a folder of the same files gives."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from composer_jax.data.sources import Crop, open_source


def png(seed, size=(40, 24)):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "a/one.png": png(1),
    "a/one.txt": b"a red cone\n",
    "a/two.PNG": png(2),
    "a/two.json": b'{"caption": "a blue ball", "width": 3}',
    "three.png": png(3),
    "three.json": b"{broken",
    "four.png": b"no image",
    "words.txt": b"of no image",
}


def pack(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_tars_hold_images_and_their_captions(tmp_path):
    pack(tmp_path / "0.tar", dict(list(FILES.items())[:4]))
    pack(tmp_path / "1.tar", dict(list(FILES.items())[4:]))
    source = open_source(f"tar:{tmp_path}/*.tar", size=16)
    found = source.batch(range(len(source)))
    assert len(source) == 4
    assert found["given"]["caption"] == ["a red cone", "a blue ball", ""]
    assert list(source.skipped) == [f"{tmp_path}/1.tar/four.png"]
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = open_source(f"folder:{tmp_path / 'folder'}", size=16)
    of_folder = {folder.label(i): i for i in range(len(folder))}
    same = folder.batch([of_folder[name] for name in ("a/one.png", "a/two.PNG", "three.png")])
    np.testing.assert_array_equal(found["image"], same["image"])


def test_a_truncated_tar_gives_what_it_still_holds(tmp_path, caplog):
    path = pack(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(6)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    source = open_source(f"tar:{path}", size=16)
    found = source.batch(range(len(source)))
    assert 1 <= len(found["image"]) <= 4
    assert "cut short" in caplog.text or source.skipped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "finds no file"),
        (lambda folder: pack(folder / "0.tar", FILES, "w:gz"), "compressed, or no tar"),
        (lambda folder: pack(folder / "0.tar", {"a.txt": b"x"}), "holds no image"),
    ],
)
def test_tars_that_cannot_be_used_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(f"tar:{tmp_path}/*.tar", size=16)


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
        writer.write(features.serialize_example({"picture": io.BytesIO(png(i, (24, 24))),
                                                 "label": i % 2}))  # fmt: skip
    writer.close()
    features.save_config(str(folder))
    split = {"name": "test", "numBytes": "1", "shardLengths": ["5"],
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}  # fmt: skip
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds_gives_images_and_labels_as_captions(dataset):
    source = open_source(f"tfds:{dataset}:test", size=24)
    found = source.batch(range(len(source)))
    assert found["given"]["caption"] == ["red cone", "blue ball"] * 2 + ["red cone"]
    wanted = np.asarray(Image.open(io.BytesIO(png(3, (24, 24)))))
    np.testing.assert_array_equal(found["image"][3], wanted)
    with pytest.raises(ValueError, match="one of its splits"):
        open_source(f"tfds:{dataset}:train", size=24)
    with pytest.raises(ValueError, match="source tfds:no_such_dataset"):
        open_source("tfds:no_such_dataset", size=24)


def test_crops_and_flips_are_functions_of_seed_and_index(tmp_path):
    pack(tmp_path / "0.tar", {f"{i}.png": png(i, (64, 16)) for i in range(12)})

    def images(**crop):
        source = open_source(f"tar:{tmp_path}/0.tar", size=16, crop=Crop(**crop))
        return source.batch(range(12))["image"], source.batch([7, 3])["image"]

    plain, _ = images()
    drawn, two = images(random=True, flip=True, seed=1)
    np.testing.assert_array_equal(two, drawn[[7, 3]])
    np.testing.assert_array_equal(images(random=True, flip=True, seed=1)[0], drawn)
    assert not np.array_equal(images(random=True, flip=True, seed=2)[0], drawn)
    flipped, _ = images(flip=True)
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, plain, strict=True)]
    as_it_was = [np.array_equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert all(np.logical_xor(mirrored, as_it_was)) and 2 < sum(mirrored) < 10
    with pytest.raises(ValueError, match="captions say left and right"):
        open_source("scenes:4", size=16, crop=Crop(flip=True))
