import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from composer_jax.conditions.image import (
    decode_image,
    fit_map,
    fit_photo,
    fit_region,
    load_array,
    load_image,
    load_numbers,
    load_region,
    load_rgba,
    on_white,
)
from tests.png import png

pytestmark = pytest.mark.fast

SIZES = st.tuples(st.integers(1, 23), st.integers(1, 23))


def picture(height=5, width=7, channels=3):
    return np.random.default_rng(height * width).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )


def test_files_and_arrays_read_alike(tmp_path):
    image = picture()
    Image.fromarray(image).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, image / 255.0):
        np.testing.assert_array_equal(load_image(source), image)


def test_grey_of_8_16_and_1_bit(tmp_path):
    grey = picture(channels=1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "32.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "f.tiff")
    expected = np.repeat(grey[..., None], 3, axis=2)
    sources = [tmp_path / name for name in ("8.png", "16.png", "32.tiff", "f.tiff")]
    for source in (*sources, grey, grey.astype(np.uint16) * 257, grey[..., None]):
        assert abs(load_image(source).astype(int) - expected).max() <= (
            1 if str(source).endswith("tiff") else 0
        )
    Image.fromarray(grey > 99).save(tmp_path / "1.png")
    np.testing.assert_array_equal(load_image(tmp_path / "1.png"), load_image(grey > 99))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_rounded_not_cut(tmp_path, channels):
    """Every upper byte with a lower byte that rounds up, down, and to itself."""
    levels = np.arange(0, 65536, 101, dtype=np.uint16)[: 24 * 27]
    deep = np.stack([np.roll(levels, i) for i in range(channels)], -1).reshape(24, 27, channels)
    (tmp_path / "deep.png").write_bytes(png(deep, 16))
    wanted = np.rint(deep.astype(np.float64) * 255 / 65535).astype(np.uint8)
    grey = wanted[..., :1].repeat(3, axis=2) if channels < 3 else wanted[..., :3]
    found = load_rgba(tmp_path / "deep.png")
    np.testing.assert_array_equal(found[..., :3], grey)
    if channels in (2, 4):
        np.testing.assert_array_equal(found[..., 3], wanted[..., -1])
    numbers = np.atleast_3d(load_numbers(tmp_path / "deep.png"))
    np.testing.assert_array_equal(numbers[..., -1], deep[..., -1])
    np.testing.assert_array_equal(load_rgba(deep), found)
    tags = {"compression": "tiff_lzw"} if channels == 3 else {}
    if channels in (1, 3):
        save_tiff(tmp_path / "deep.tif", deep, **tags)
        np.testing.assert_array_equal(load_image(tmp_path / "deep.tif"), grey)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("channels", [3, 4])
def test_white_in_a_deep_jpeg_2000_is_white(tmp_path, bits, channels):
    """Pillow 13 rounds without clipping, so that the highest half level is 0."""
    deep = np.linspace(0, 2**bits - 1, 32 * 32 * channels).reshape(32, 32, channels)
    deep = deep.round().astype(np.uint16)
    deep[-1] = 2**bits - 1
    # a file of 12 bits is one of 16 around the same middle, with another precision in its header
    content = cv2.imencode(".jp2", deep + (32768 - 2 ** (bits - 1)))[1].tobytes()
    start = content.index(b"\xff\x4f\xff\x51") + 42
    precisions = bytes([bits - 1, 1, 1] * channels)
    content = content[:start] + precisions + content[start + len(precisions) :]
    (tmp_path / "deep.jp2").write_bytes(content)
    wanted = np.rint(deep * (255 / (2**bits - 1))).astype(np.uint8)[..., [2, 1, 0, 3][:channels]]
    np.testing.assert_array_equal(load_rgba(tmp_path / "deep.jp2"), wanted)
    np.testing.assert_array_equal(decode_image(content, "tar/deep.jp2"), on_white(wanted))
    image = Image.fromarray(picture(32, 32, channels))
    image.save(tmp_path / "plain.jp2")
    np.testing.assert_array_equal(load_rgba(tmp_path / "plain.jp2"), image)


def save_tiff(path, deep, compression=None):
    """A TIFF of 16 bits a channel; Pillow itself writes grey ones alone."""
    import cv2

    if deep.shape[2] == 1:
        Image.fromarray(deep[..., 0]).save(path)
    else:
        cv2.imwrite(str(path), deep[..., ::-1])
    assert compression is None or Image.open(path).info["compression"] == compression


@pytest.mark.parametrize(("channels", "clear"), [(1, ">H"), (3, ">3H")])
def test_a_transparent_colour_of_16_bits_is_transparent(tmp_path, channels, clear):
    deep = np.arange(12 * channels, dtype=np.uint16).reshape(3, 4, channels) * 999
    chunk = struct.pack(clear, *deep[1, 2].tolist())
    (tmp_path / "deep.png").write_bytes(png(deep, 16, tRNS=chunk))
    alpha = load_rgba(tmp_path / "deep.png")[..., 3]
    assert alpha[1, 2] == 0 and (alpha == 255).sum() == 11


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_at_any_depth(tmp_path, orientation):
    image, exif = picture(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "8.png", exif=exif)
    wanted = load_image(tmp_path / "8.png")
    assert wanted.shape == (image.shape if orientation < 5 else image.swapaxes(0, 1).shape)
    (tmp_path / "16.png").write_bytes(
        png(image.astype(np.uint16) * 257, 16, eXIf=exif.tobytes().removeprefix(b"Exif\0\0"))
    )
    np.testing.assert_array_equal(load_image(tmp_path / "16.png"), wanted)


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 5, 3), level, np.uint8)) for level in (200, 10)]
    for name, options in {
        "a.gif": {},
        "a.png": {},
        "a.webp": {"lossless": True},
        "a.tif": {},
    }.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (load_image(tmp_path / name) == 200).all()


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    dark = np.full((3, 3), 200, np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    (tmp_path / "dark.pgm").write_bytes(b"P5 3 3 65535\n" + dark.astype(">u2").tobytes())
    Image.frombytes("I;16B", (3, 3), dark.astype(">u2").tobytes()).save(tmp_path / "dark.tiff")
    for name in ("dark.png", "dark.pgm", "dark.tiff"):
        assert load_image(tmp_path / name).max() == 1


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_wide_integers_have_the_least_usual_range_that_holds_them(tmp_path, white):
    mask = np.int32([[0, white], [white, 0]])
    Image.fromarray(mask).save(tmp_path / "mask.tiff")
    np.testing.assert_array_equal(load_region(tmp_path / "mask.tiff"), mask / white)
    np.testing.assert_array_equal(load_image(tmp_path / "mask.tiff")[..., 0], mask // white * 255)


def test_transparency_lies_on_white(tmp_path):
    image = picture(channels=4)
    image[0, 0] = (10, 20, 30, 0)
    image[0, 1] = (10, 20, 30, 255)
    image[0, 2] = (0, 100, 200, 128)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_rgba(tmp_path / "a.png"), image)
    for source in (image, tmp_path / "a.png"):
        seen = load_image(source)
        assert seen[0, 0].tolist() == [255, 255, 255] and seen[0, 1].tolist() == [10, 20, 30]
        np.testing.assert_allclose(seen[0, 2], [127, 177, 227], atol=1)
    small = Image.fromarray(image[..., :3]).quantize(16)
    small.save(tmp_path / "p.png", transparency=small.getpixel((0, 0)))
    assert load_image(tmp_path / "p.png")[0, 0].tolist() == [255, 255, 255]


def test_exif_orientation_is_honoured(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise
    Image.fromarray(image).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = load_image(tmp_path / "turned.jpg")
    assert seen.shape == (16, 8, 3)
    assert seen[:6].min() > 200 and seen[10:].max() < 50


def png_header(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(40000, 40000), (10001, 10000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_by_its_header(tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png_header(width, height))
    with pytest.raises(ValueError, match=r"huge\.png is too large \(.*at most 100 megapixels"):
        load_image(tmp_path / "huge.png")


def test_broken_files_are_named_in_one_line(tmp_path):
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "hollow.png").write_bytes(png_header(8, 8))
    (tmp_path / "folder").mkdir()
    for name, message in {
        "cut.jpg": "is broken",
        "text.png": "is not an image",
        "empty.png": "is not an image",
        "hollow.png": "is broken",
        "folder": "is a folder",
        "none.png": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def painting(dtype, white, channels):
    """A square, painted white; around it black, or, where there is alpha, transparent."""
    array = np.zeros((64, 64, channels), dtype)
    array[16:48, 16:48] = white
    if channels in (2, 4):
        array[:16, :, :-1] = white  # what is under the transparent is not painted
    return array


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        ("?", True),
        ("u1", 255),
        ("u1", 1),
        ("u2", 65535),
        ("u2", 255),
        ("i8", 255),
        ("f4", 1.0),
        ("f8", 255.0),
    ],
)
def test_where_white_is_painted_is_a_region_of_any_kind(tmp_path, dtype, white, channels):
    array = painting(dtype, white, channels)
    array = array[..., 0] if channels == 1 and dtype not in ("i8", "f8") else array
    region = load_region(array)
    assert region.shape == (64, 64) and region.dtype == np.float32
    assert region.mean() == 0.25 and (region[16:48, 16:48] == 1).all()
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(load_region(tmp_path / "a.npy"), region)
    if array.dtype.kind == "u":
        depth = 8 * array.dtype.itemsize
        (tmp_path / "a.png").write_bytes(png(np.atleast_3d(array), depth))
        np.testing.assert_array_equal(load_region(tmp_path / "a.png"), region)


def test_half_painted_is_half_a_region():
    array = np.full((2, 2, 4), 255, np.uint8)
    array[0, 0, 3], array[0, 1, :3] = 51, 102
    np.testing.assert_allclose(load_region(array), [[0.2, 0.4], [1, 1]], atol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), 2.0), "values from 2 to 2; 0 to 1 is wanted"),
        (np.full((2, 2), 256), "values from 256 to 256"),
        (np.full((2, 2), -1), "values from -1"),
        (np.full((2, 2), np.nan), "values from nan"),
        (np.zeros((2, 2, 5)), r"shape \(2, 2, 5\)"),
        (np.zeros((0, 2)), "shape"),
        (np.zeros(3), "shape"),
        (np.array([["a"]]), "is a ndarray; an array of numbers is"),
        (None, "is a NoneType"),
        ([[1], [1, 2]], "is a list"),
    ],
)
def test_what_is_no_region_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_region(array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 5), np.uint8), r"shape \(2, 2, 5\); allowed"),
        (np.zeros((0, 2, 3), np.uint8), "shape"),
        (np.zeros(3, np.uint8), "shape"),
        (np.zeros((2, 2), np.int64), "int64; allowed"),
        (np.full((2, 2), 255.0), r"outside \[0, 1\]"),
        (np.full((2, 2), np.nan), r"outside \[0, 1\]"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_npy_files(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no")
    assert load_array(tmp_path / "a.npy").tolist() == [0, 1, 2]
    for name in ("pickle.npy", "text.npy", "none.npy"):
        with pytest.raises(ValueError, match=name):
            load_array(tmp_path / name)


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, st.sampled_from(["nearest", "area"]), st.sampled_from(["|u1", "<u2", "<f4"]))
def test_fit_map_keeps_dtype_and_constants_and_invents_no_values(source, target, how, dtype):
    array = picture(*source)[..., 0].astype(dtype)
    fitted = fit_map(array, target, how)
    assert fitted.shape == target and fitted.dtype == array.dtype
    assert array.min() <= fitted.min() and fitted.max() <= array.max()
    if how == "nearest":
        assert np.isin(fitted, array).all()
    constant = np.full((*source, 3), 7, dtype)
    np.testing.assert_array_equal(fit_map(constant, target, how), np.full((*target, 3), 7, dtype))


def test_a_map_may_be_cut_by_a_factor_that_rounds_up():
    fitted = fit_map(np.full((2, 21), 7, np.uint8), (1, 19), "area")
    assert fitted.shape == (1, 19) and (fitted == 7).all()


def test_area_averages_blocks_and_crops_the_middle():
    array = np.arange(64, dtype=np.float32).reshape(8, 8)
    blocks = array.reshape(4, 2, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(fit_map(array, (4, 4), "area"), blocks)
    wide = np.zeros((4, 12), np.uint16)
    wide[:, 4:8] = 60000
    assert (fit_map(wide, (2, 2), "area") == 60000).all()
    assert (fit_map(wide, (8, 8), "nearest") == 60000).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 199), st.integers(5, 40))
def test_lines_survive_any_shrinking(position, size):
    """A one-pixel line in 200 px is gone after averaging and thresholding, not here."""
    array = np.zeros((200, 200), np.uint8)
    array[position] = 255
    fitted = fit_map(array, (size, size), "lines")
    assert set(np.unique(fitted)) == {0, 255}
    assert (fitted > 0).any(axis=0).all() and (fitted > 0).sum() == size


def test_lines_stay_one_pixel_wide_when_enlarged():
    array = np.zeros((16, 16), np.uint8)
    array[8] = 255
    fitted = fit_map(array, (64, 64), "lines")
    assert fitted.max() == 255 and (fitted > 0).sum(axis=0).max() <= 1


@pytest.mark.parametrize("shape", [(120, 181), (181, 120), (97, 97), (60, 91)])
@pytest.mark.parametrize("size", [(32, 32), (24, 36), (96, 96)])
def test_a_photo_and_what_is_drawn_on_it_are_cropped_alike(shape, size):
    """A mark on a photo, in a region and in an id map of the photo's size stays in one place."""
    mark = np.zeros(shape, np.float32)
    top, left = (int(0.45 * side) for side in shape)
    mark[top : top + shape[0] // 4, left : left + shape[1] // 5] = 1.0
    photo = fit_photo(np.uint8(255 * mark)[..., None].repeat(3, axis=2), size)[..., 0] / 255.0

    def middle(weights):
        return np.array([np.average(index, weights=weights) for index in np.indices(size)])

    found = {how: fit_map(mark, size, how) for how in ("area", "nearest")}
    found["region"] = fit_map(fit_region(mark, size), size, "area")
    for how, map in found.items():
        np.testing.assert_allclose(middle(map), middle(photo), atol=0.5, err_msg=how)


@pytest.mark.parametrize("shape", [(400, 600), (301, 200), (64, 65)])
def test_a_photo_is_cut_to_its_middle_and_resized_with_lanczos(shape):
    from PIL import Image

    photo = picture(*shape)
    side, (top, left) = min(shape), ((n - min(shape)) // 2 for n in shape)
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    wanted = crop.resize((48, 48), Image.Resampling.LANCZOS, reducing_gap=3.0)
    np.testing.assert_array_equal(fit_photo(photo, (48, 48)), wanted)
    np.testing.assert_array_equal(fit_map(photo, (48, 48), "photo"), wanted)


def test_a_coarse_region_keeps_its_edges():
    np.testing.assert_array_equal(fit_region(np.array([[1.0, 0.0]]), (4, 4)), [[1, 1, 0, 0]] * 4)
    square = np.eye(3)
    assert fit_region(square, (64, 64)) is square
