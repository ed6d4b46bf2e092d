"""`composer edit`: every task by its name, and what a user may get wrong."""

import numpy as np
import pytest
from PIL import Image

import composer_jax as cj
from composer_jax.cli import main
from composer_jax.sampling.edits import TASKS
from tests.disks import file_limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images, an id map and a region."""
    folder = tmp_path_factory.mktemp("pictures")
    batch = cj.open_source("scenes:2", size=64).batch([0, 1])
    for name, image in zip("ab", batch["image"], strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(batch["given"]["instances"][0].astype(np.uint8)).save(folder / "ids.png")
    region = np.zeros((64, 64), np.uint8)
    region[16:48, 8:40] = 255
    Image.fromarray(region).save(folder / "region.png")
    Image.fromarray(region[:32]).save(folder / "half.png")
    return folder


def edit(folder, words, *more):
    return main(["edit", *(w.replace("@", f"{folder}/") for w in words.split()), *map(str, more)])


@pytest.mark.parametrize(
    "words, count",
    [
        ("variation @a.png --count 2 --hold palette,semantics", 2),
        ("interpolation @a.png @b.png --count 3 --hold-second sketch", 3),
        ("reconfiguration @a.png --palette #d62828 --own.instances @ids.png", 1),
        ("style-transfer @a.png @b.png --strength 0.5 --count 1", 1),
        ("inpainting @a.png --region @region.png --border 2 --caption cone --count 1", 1),
    ],
)
def test_a_task_ends_in_images_and_a_grid_that_begins_with_its_sources(
    run, folder, tmp_path, words, count
):
    out = tmp_path / "out"
    assert edit(folder, f"{words} --steps 2", "--model", run, "--out", out) == 0
    images = cj.load_image(out / "grid.png")
    sources = TASKS[words.split()[0]].images
    assert images.shape[:2] == (66, 66 * (len(sources) + count))
    np.testing.assert_array_equal(images[:64, :64], cj.load_image(folder / "a.png"))
    last = cj.load_image(out / f"{count - 1:04d}.png")
    np.testing.assert_array_equal(images[:64, -66:-2], last)
    assert not (out / f"{count:04d}.png").exists()
    if "--region" in words:
        np.testing.assert_array_equal(last[:16], cj.load_image(folder / "a.png")[:16])


@pytest.mark.parametrize(
    "words, said",
    [
        ("variations @a.png", "did you mean 'variation'?"),
        ("variation", "required: IMAGE"),
        ("variation @a.png @b.png", "unrecognized arguments"),
        ("variation @a.png --holds palette", "did you mean '--hold'?"),
        ("variation @a.png --hold palete", "did you mean 'palette'?"),
        ("variation @none.png", "none.png"),
        ("variation @a.png --count 0", "--count: the value is 0; a whole number from 1"),
        ("variation @a.png --steps 0", "steps"),
        ("variation @a.png --hold depth", "a depth network"),
        ("variation @a.png --region @half.png", "region has shape [32, 64]"),
        ("style-transfer @a.png", "required: STYLE"),
        ("style-transfer @a.png @b.png --strength 2", "--strength: the value is 2.0"),
        ("interpolation @a.png @b.png --count 1", "at least 2"),
        ("reconfiguration @a.png", "needs what to change"),
        ("reconfiguration @a.png --palette red --count 2", "give eta above 0"),
        ("colourisation @a.png", "required: --palette"),
        ("translation @a.png", "required: --caption"),
        ("pose-transfer @a.png", "required: --instances"),
        ("try-on @a.png @b.png", "required: --region"),
        ("inpainting @a.png --region @region.png --border -1", "--border: the value is -1.0"),
    ],
)
def test_mistakes_are_one_line(run, folder, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    assert edit(folder, words, "--model", run, "--out", out) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_images_are_not_written_over(run, folder, tmp_path, capsys):
    (tmp_path / "0000.png").touch()
    assert edit(folder, "variation @a.png", "--model", run, "--out", tmp_path) == 2
    assert "holds 0000.png already" in capsys.readouterr().err
    assert (tmp_path / "0000.png").stat().st_size == 0


def test_an_edit_goes_on_after_trouble(run, folder, tmp_path, capsys, caplog):
    out = tmp_path / "made/out"
    words = "variation @a.png --count 2 --steps 2"
    for size in (0, 2000):  # no room for call.json, then for no image
        with file_limit(size):
            assert edit(folder, words, "--model", run, "--out", out) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{out}/" in error and "file system" in error
    assert edit(folder, words, "--model", run, "--out", out) == 0
    images = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "0001.png").write_bytes(images["0001.png"][:100])
    assert edit(folder, words, "--model", run, "--out", out) == 0
    assert "0001.png is damaged" in caplog.text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == images
    assert edit(folder, f"{words} --seed 1", "--model", run, "--out", out) == 2
    assert "another seed (0, now it is 1); give another --out" in capsys.readouterr().err
