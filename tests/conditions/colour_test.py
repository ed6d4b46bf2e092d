"""Colour management: what a file's profile or gamma means is what is read."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data

from composer_jax.conditions.image import decode_image, load_image, load_numbers, load_rgba
from tests.png import png

pytestmark = pytest.mark.fast

PHOTO = data.coffee()[::8, ::8]
WHITE = (0.9642, 1.0, 0.8249)  # D50, as profiles have it
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space, tags, kind=b"mntr", connection=b"XYZ "):
    """An ICC profile (version 4) of tags by name."""
    tags = {
        b"desc": b"mluc" + struct.pack(">6I", 0, 1, 12, 0x656E5553, 2, 28) + b"\0p",
        b"cprt": b"mluc" + struct.pack(">6I", 0, 1, 12, 0x656E5553, 2, 28) + b"\0p",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*WHITE),
        **tags,
    }
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"", 0x04000000, kind, space, connection)
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + fixed(*WHITE)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gamma(exponent):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def of_rgb(columns, curve=SRGB_CURVE):
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {n: b"XYZ \0\0\0\0" + fixed(*c) for n, c in zip(names, columns, strict=True)}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def of_grey(exponent):
    return profile(b"GRAY", {b"kTRC": gamma(exponent)})


def of_cmyk():
    """Full ink of each kind, and nothing else, is known: black takes all light, the others none."""
    cells = [(0 if black else 255, 128, 128) for *_, black in np.ndindex(2, 2, 2, 2)]
    table = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += 4 * table + bytes(np.ravel(cells).tolist()) + 3 * table
    return profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, b"prtr", b"Lab ")


def far(a, b):
    return np.abs(a.astype(int) - b).max()


def seen(levels, columns=SRGB, curve=lambda v: v**2.2):
    """What levels uint8 under a profile are in sRGB, by the definitions (in float, clipped)."""
    xyz = curve(levels / 255.0) @ np.array(columns)
    linear = (xyz @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return encoded * 255


def srgb_curve(v):
    return np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize(
    ("columns", "curve", "exponent"),
    [(P3, SRGB_CURVE, srgb_curve), (SRGB, gamma(1.8), lambda v: v**1.8)],
)
def test_a_profile_of_rgb_is_applied(tmp_path, kind, columns, curve, exponent):
    path, smooth = tmp_path / f"a.{kind}", np.kron(PHOTO[::8, ::8], np.ones((8, 8, 1))).astype("u1")
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {"lossless": True}
    Image.fromarray(smooth).save(path, icc_profile=of_rgb(columns, curve), **options)
    with Image.open(path) as file:
        wanted = seen(np.asarray(file), columns, exponent)
    assert far(load_image(path), wanted) < 1.6
    assert far(load_image(path), smooth) > 10
    np.testing.assert_array_equal(decode_image(path.read_bytes(), "a"), load_image(path))


def test_16_bits_palettes_and_alpha_go_through_the_profile(tmp_path):
    exchanged = of_rgb([SRGB[1], SRGB[0], SRGB[2]])
    embedded = b"p\0\0" + zlib.compress(exchanged)
    alpha = np.arange(PHOTO[..., 0].size, dtype=np.uint8).reshape(PHOTO.shape[:2])
    few = Image.fromarray(PHOTO).quantize(8)
    few.save(tmp_path / "few.png", icc_profile=exchanged)
    (tmp_path / "deep.png").write_bytes(png(PHOTO.astype(np.uint16) * 257, 16, iCCP=embedded))
    (tmp_path / "clear.png").write_bytes(png(np.dstack([PHOTO, alpha]), iCCP=embedded))
    clear = load_rgba(tmp_path / "clear.png")
    for found, wanted in (
        (load_image(tmp_path / "few.png"), np.asarray(few.convert("RGB"))),
        (load_image(tmp_path / "deep.png"), PHOTO),
        (clear[..., :3], PHOTO),
    ):
        assert far(found, wanted[..., [1, 0, 2]]) <= 1
    np.testing.assert_array_equal(clear[..., 3], alpha)


def test_profiles_of_grey_ink_and_lab(tmp_path):
    grey = Image.fromarray(PHOTO).convert("L")
    levels = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    for kind in (of_grey(1.8), of_rgb(SRGB, gamma(1.8))):
        grey.save(tmp_path / "grey.png", icc_profile=kind)
        assert far(load_image(tmp_path / "grey.png"), seen(levels, SRGB, lambda v: v**1.8)) < 1.6
    inks = np.zeros((1, 3, 4), np.uint8)
    inks[0, 1], inks[0, 2] = (255, 255, 255, 0), (0, 0, 0, 255)
    image = Image.frombytes("CMYK", (3, 1), inks.tobytes())
    image.save(tmp_path / "ink.tif", icc_profile=of_cmyk())
    assert load_image(tmp_path / "ink.tif")[0].tolist() == [[255] * 3, [255] * 3, [0] * 3]
    image.save(tmp_path / "plain.tif")
    assert load_image(tmp_path / "plain.tif")[0].tolist() == [[255] * 3, [0] * 3, [0] * 3]
    lab = np.uint8([[[0, 0, 0], [255, 0, 0], [137, 0, 0]]])  # L of 0, 100, 53.6 %
    Image.frombytes("LAB", (3, 1), lab.tobytes()).save(tmp_path / "lab.tif")
    assert far(load_image(tmp_path / "lab.tif"), np.uint8([[[0] * 3, [255] * 3, [128] * 3]])) <= 1


@pytest.mark.parametrize(
    "kind",
    [
        b"",
        b"no profile",
        of_rgb(P3)[:200],
        of_rgb(P3)[:128] + bytes(300),
        of_rgb([(0, 0, 0)] * 3),  # all is black
        of_grey(1.8),  # not for RGB
        of_rgb(P3).replace(b"mntr", b"link"),
        of_rgb(SRGB),  # sRGB itself, in other words
    ],
)
def test_a_profile_that_is_broken_or_none_of_this_image_changes_nothing(tmp_path, kind):
    Image.fromarray(PHOTO).save(tmp_path / "a.png", icc_profile=kind)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), PHOTO)


def test_numbers_of_maps_are_not_colours(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "a.png", icc_profile=of_rgb(P3))
    np.testing.assert_array_equal(load_numbers(tmp_path / "a.png"), PHOTO)


def gama(value):
    return struct.pack(">I", round(value * 100_000))


def chrm(*values):
    return struct.pack(">8I", *(round(value * 100_000) for value in values))


USUAL = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
WIDE = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
LINEAR = lambda v: v  # noqa: E731


@pytest.mark.parametrize(
    ("chunks", "columns", "curve"),
    [
        ({"gAMA": gama(1.0)}, SRGB, LINEAR),
        ({"gAMA": gama(1.0), "cHRM": chrm(*USUAL)}, SRGB, LINEAR),
        ({"gAMA": gama(1.0), "cHRM": chrm(*WIDE)}, P3, LINEAR),
        ({"gAMA": gama(0.45455), "cHRM": chrm(*WIDE)}, P3, srgb_curve),
        ({"gAMA": gama(0.45455), "cHRM": chrm(*USUAL)}, SRGB, srgb_curve),
        ({"gAMA": gama(1.0), "sRGB": b"\0"}, SRGB, srgb_curve),
        ({"cHRM": chrm(*WIDE)}, SRGB, srgb_curve),  # says nothing without a gamma
        ({"gAMA": gama(0)}, SRGB, srgb_curve),
        ({"gAMA": gama(1.0), "cHRM": chrm(*[0.0] * 8)}, SRGB, LINEAR),
        ({"gAMA": gama(1.0), "cHRM": chrm(*[0.3] * 8)}, SRGB, LINEAR),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
def test_gamma_and_primaries_of_png(tmp_path, chunks, columns, curve, depth):
    image = PHOTO if depth == 8 else PHOTO.astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(png(image, depth, **chunks))
    assert far(load_image(tmp_path / "a.png"), seen(PHOTO, columns, curve)) < 1.6


def test_grey_has_a_gamma_too(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.uint8([[[0], [55], [255]]]), gAMA=gama(1.0)))
    assert load_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 128, 255]
