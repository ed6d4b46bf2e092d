"""Composer's tasks: what each is defined to keep, keeps; where nothing changes, nothing does."""

import inspect
from functools import partial

import jax
import numpy as np
import pytest
import skimage.data
from PIL import Image

import composer_jax as cj
from composer_jax.evaluation.control import extract_all
from composer_jax.sampling import edits
from composer_jax.sampling.edits import TASKS
from composer_jax.sampling.picture import Picture

RED = ["#d62828"]
REGION = np.zeros((64, 64), np.float32)
REGION[20:44, 10:50] = 1.0
QUICK = {"steps": 2}
EXACT = {"steps": 20}  # enough for an inversion to come back


@pytest.fixture(scope="module")
def scenes(pipe):
    """Two scenes, with what is known of them."""
    batch = cj.open_source("scenes:2", size=64).batch([0, 1])
    pictures = []
    for i in range(2):
        given = {name: value[i] for name, value in batch["given"].items()}
        known = cj.decompose(
            batch["image"][i], only=("caption", "depth", "instances"), given=given, tools=None
        )
        pictures.append(Picture(pipe, batch["image"][i], known))
    return pictures


def through_codec(pipe, picture):
    return pipe({}, image=picture.pixels, keep=np.ones((64, 64)), steps=2)[0]


def far(a, b):
    return np.abs(a.astype(np.float32) - b).mean()


def call(pipe, name, scenes, **options):
    task = TASKS[name]
    needs = {
        "given": {"palette": RED},
        "region": REGION,
        "palette": RED,
        "caption": "a red ball",
        "instances": REGION.astype(np.uint8),
    }
    options = {name: needs[name] for name in task.needs} | options
    return task.function(pipe, *scenes[: len(task.images)], **options)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_makes_images_and_takes_what_it_says(pipe, scenes, name):
    task = TASKS[name]
    images = call(pipe, name, scenes, count=2, **QUICK, **({"eta": 0.5} if task.count == 1 else {}))
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    assert np.any(images[0] != images[1])
    takes = list(inspect.signature(task.function).parameters)
    needs = [name for name in task.needs if name in takes]
    assert takes[: 1 + len(task.images) + len(needs)] == ["pipe", *task.images, *needs]


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if "region" in t.options + t.needs])
def test_unedited_pixels_are_the_image_s(pipe, scenes, name):
    options = QUICK | {"region": REGION, "border": 4}
    made = call(pipe, name, scenes, **options)[0]
    outside = REGION == 0.0
    np.testing.assert_array_equal(made[outside], scenes[0].pixels[outside])
    assert np.any(made[~outside] != scenes[0].pixels[~outside])


def test_a_border_fades_inwards():
    image, made = np.zeros((64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 200, np.uint8)
    hard = edits.composite(image, made, REGION)[0, :, :, 0]
    np.testing.assert_array_equal(hard, 200 * REGION)
    soft = edits.composite(image, made, REGION, border=3)[0, :, :, 0]
    np.testing.assert_array_equal(soft[32, 9:15], [0, 50, 100, 150, 200, 200])
    whole = edits.composite(image, made, np.ones((64, 64), np.float32), border=3)
    np.testing.assert_array_equal(whole, made)  # the picture's own edge is no border
    np.testing.assert_array_equal(edits.composite(image, made, 0.5 * REGION)[0, 32, 32], 100)


def test_reconfiguring_nothing_gives_the_image(pipe, scenes):
    picture = scenes[0]
    same = edits.reconfiguration(pipe, picture, {"palette": picture.pixels}, guidance=3.0, **EXACT)
    assert far(same[0], through_codec(pipe, picture)) < 1.0
    other = edits.reconfiguration(pipe, picture, {"palette": RED}, guidance=3.0, **EXACT)
    assert np.any(other != same)


def test_interpolation_begins_and_ends_at_the_images(pipe, scenes):
    frames = edits.interpolation(pipe, *scenes, count=3, **EXACT)
    for frame, picture in zip((frames[0], frames[2]), scenes, strict=True):
        assert far(frame, through_codec(pipe, picture)) < 1.0
    assert far(frames[1], frames[0]) > 1.0 < far(frames[1], frames[2])
    held = edits.interpolation(pipe, *scenes, count=3, hold=("sketch",), **EXACT)
    assert far(held[0], frames[0]) < 1.0 and np.any(held[2] != frames[2])
    held = edits.interpolation(pipe, *scenes, count=3, hold_second=("sketch",), **EXACT)
    assert far(held[2], frames[2]) < 1.0 and np.any(held[0] != frames[0])


def test_strength_leads_from_one_style_to_the_other(pipe, scenes):
    content, style = scenes
    none, other, full = (
        edits.style_transfer(
            pipe, content, image, strength=strength, output="latents", guidance=1.0, **QUICK
        )
        for image, strength in ((style, 0.0), (content, 1.0), (style, 1.0))
    )
    assert far(none, other) < 1e-5 < 1e-4 < far(none, full)


def test_image_to_image_begins_from_the_image(pipe, scenes):
    source = through_codec(pipe, scenes[0])
    near, away = (
        edits.image_to_image(pipe, scenes[0], strength=strength, **QUICK)[0]
        for strength in (0.02, 1.0)
    )
    assert far(near, source) < 4.0 < far(away, source)


def test_what_is_given_wins_and_hold_and_vary_choose(pipe, scenes):
    plain = edits.variation(pipe, scenes[0], **QUICK)
    held = edits.variation(pipe, scenes[0], hold=edits.GLOBAL, **QUICK)
    np.testing.assert_array_equal(plain, held)
    given = {"palette": scenes[1].pixels}
    fewer = edits.variation(pipe, scenes[0], hold=("caption", "semantics"), given=given, **QUICK)
    np.testing.assert_array_equal(edits.variation(pipe, scenes[0], given=given, **QUICK), fewer)
    varied = edits.variation(pipe, scenes[0], vary=("palette",), **QUICK)
    np.testing.assert_array_equal(
        varied, edits.variation(pipe, scenes[0], hold=("caption", "semantics"), **QUICK)
    )


def test_what_cannot_be_taken_is_left_out_and_named(pipe, scenes, caplog):
    caplog.set_level("INFO", "composer_jax")
    bare = Picture(pipe, scenes[0].pixels)
    made = edits.variation(pipe, bare, **QUICK)
    assert "without caption" in caplog.text and made.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(
        made, edits.variation(pipe, bare, hold=("palette", "semantics"), **QUICK)
    )


def test_a_photo_is_seen_as_training_sees_it(pipe, tmp_path):
    """Pixels and factors of a photo that is no square: what a source of images gives."""
    Image.fromarray(skimage.data.coffee()[:, :553]).save(tmp_path / "coffee.png")
    batch = cj.open_source(f"folder:{tmp_path}", size=pipe.size).batch([0])
    names, tools = ("intensity", "palette", "semantics", "sketch"), {"clip": pipe.clip}
    trained = extract_all(batch["image"], batch["given"], names, tools)[0]
    picture = Picture(pipe, tmp_path / "coffee.png")
    np.testing.assert_array_equal(picture.pixels, batch["image"][0])
    near = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(near, picture.factors(names), trained)
    everything = np.full(skimage.data.coffee().shape[:2], 255, np.uint8)[:, :553]
    masked = pipe.stored("mask", (tmp_path / "coffee.png", everything))
    np.testing.assert_array_equal(masked["image"], batch["image"][0])


def test_a_region_drawn_on_a_photo_is_cropped_as_the_photo_is(pipe):
    photo, region = skimage.data.coffee(), np.zeros((400, 600), np.float32)
    region[100:300, 100:300] = 1.0  # the left half of the middle, between a quarter and three
    ((one,),) = pipe.uses({"palette": cj.use(RED, region=region)}).values()
    wanted = np.zeros((64, 64), np.float32)
    wanted[16:48, :32] = 1.0
    np.testing.assert_array_equal(one.region, wanted)
    np.testing.assert_array_equal(Picture(pipe, photo).region(region), wanted)
    ((again,),) = pipe.uses({"palette": [one]}).values()
    assert again is one
    with pytest.raises(ValueError, match="outside the middle"):
        pipe.uses({"palette": cj.use(RED, region=np.eye(1, 4, 0))})
    with pytest.raises(ValueError, match="outside the middle"):
        Picture(pipe, photo).region(region * 0.0 + (np.arange(600) < 100))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("variation", {"hold": ("depth",)}, "a depth network"),
        ("variation", {"hold": ("plasma",)}, "no condition 'plasma'"),
        ("variation", {"vary": ("palete",)}, "did you mean 'palette'"),
        ("variation", {"vary": edits.GLOBAL}, "none of caption, palette, semantics is left"),
        ("variation", {"region": np.ones((64, 32))}, "region"),
        ("variation", {"region": 0 * REGION}, "region is empty"),
        ("variation", {"region": 2 * REGION}, "0 to 1"),
        ("variation", {"region": REGION, "border": -1}, "border is -1"),
        ("reconfiguration", {"count": 2}, "give eta above 0"),
        ("style-transfer", {"strength": 1.5}, "strength is 1.5"),
        ("image-to-image", {"strength": 0.0}, "strength is 0.0"),
        ("interpolation", {"count": 1}, "at least 2"),
        ("interpolation", {"hold": ("palette",), "vary": ("palette",)}, "hold and vary both name"),
        ("interpolation", {"hold": ("palette",), "hold_second": ("palette",)}, "both name palette"),
        ("interpolation", {"hold_second": ("palette",), "given": {"palette": RED}}, "given both"),
        ("interpolation", {"vary": ("depth",)}, "a depth network"),
        ("variation", {"vary": ("depth",)}, "vary names depth, which is not held: this task holds"),
        ("image-to-image", {"vary": ("palette",)}, "this task holds nothing by itself"),
        ("variation", {"hold": ("palette",), "vary": ("palette",)}, "hold and vary are both given"),
        ("variation", {"hold": ("palette",), "given": {"palette": RED}}, "palette is given, so"),
        ("variation", {"border": 2.0}, "border is for region"),
        ("reconfiguration", {"border": 2.0}, "border is for region"),
        ("reconfiguration", {"start": 0.5}, "start is 1 here"),
        ("reconfiguration", {"count": "2", "eta": 0.5}, "count is '2'"),
        ("interpolation", {"count": "7"}, "count is '7'; a way has at least 2"),
        ("image-to-image", {"strength": "0.5"}, "strength is '0.5'; a number above 0"),
        ("image-to-image", {"start": 0.5}, "start is what strength says"),
        ("variation", {"region": REGION, "border": "2"}, "border is '2'"),
        ("variation", {"vary": "palete"}, "did you mean 'palette'"),
        ("variation", {"hold": "plasma,depth"}, "no condition 'plasma'"),
        ("interpolation", {"hold": "palette", "vary": "palette"}, "hold and vary both name"),
    ],
)
def test_mistakes_are_one_line(pipe, scenes, name, options, words):
    bare = [Picture(pipe, picture.pixels) for picture in scenes]
    with pytest.raises(ValueError, match=words) as error:
        call(pipe, name, bare, **options, **QUICK)
    assert "\n" not in str(error.value)
