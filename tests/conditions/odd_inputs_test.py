"""What nobody should hand in: every condition refuses it in one line, or what it gives is whole."""

import numpy as np
import pytest

from composer_jax import conditions
from composer_jax.conditions.decompose import decompose

IMAGE = np.zeros((4, 4, 3), np.uint8)
ODD = [
    *(
        np.zeros(shape, np.uint8)
        for shape in ((), (0,), (0, 0), (0, 3, 3), (4, 4, 9), (2, 4, 4, 3))
    ),
    *(np.full((4, 4), value) for value in (np.nan, np.inf, -1.0, 1e30, 2**40)),
    *(np.full((4, 4), 7, dtype) for dtype in ("c8", "u4", "u8", "M8[s]", "U1", "O")),
    *(np.full(156, value) for value in (np.inf, True, 1j)),
    np.zeros((1, 1)),
    np.zeros((1, 1, 4), np.uint8),
    np.full((1, 9), 255, np.uint8),
    np.zeros((), [("ids", "u1", (4, 4))]),
    np.zeros(3, [("ids", "u1", (4, 4)), ("classes", "i4", 32)]),
    *(
        None,
        5,
        b"abc",
        object(),
        "",
        " ",
        "nowhere.png",
        "nowhere.npy",
        "a\0b.png",
        "x" * 300 + ".png",
    ),
    *([], {}, (), (1, 2), {"a": 1}, ("a.png", "b.png"), "a.png:b.png", ":", "a:region="),
    {"ids": np.full((4, 4), 99), "classes": np.zeros(32)},
    {"ids": np.zeros((4, 4)), "classes": np.zeros(3)},
    {"ids": np.full((4, 4), 0.5), "classes": np.zeros(32)},
    {"map": np.zeros((4, 4)), "weights": [1, 1, 0]},
    {"map": np.zeros((4, 4)), "weights": [np.nan, 1, 0]},
    {"image": IMAGE, "keep": np.zeros((4, 9))},
    {"image": None, "keep": None},
    {"image": IMAGE, "region": "nowhere.png"},
]


@pytest.mark.parametrize(
    "name", [n for n in conditions.names() if conditions.get(n).tool != "clip"]
)
@pytest.mark.filterwarnings("error")
def test_odd_inputs_are_refused_in_one_line_or_read_whole(name):
    condition, refused = conditions.get(name), 0
    for source in ODD:
        try:
            stored = condition.parse(source)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
            continue
        condition.checked(stored)
        assert condition.render(condition.fit(stored, (8, 8))).dtype == np.uint8
    assert refused > len(ODD) / 2


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        ("instances", {"ids": np.zeros((4, 4))}, "instances lacks 'classes'; it has ids, classes"),
        ("instances", {"id": 0}, "instances has no 'id'; it has ids, classes"),
        ("instances", {"ids": IMAGE, "classes": np.zeros(32)}, r"ids has shape .*; \[h, w\]"),
        ("instances", {"ids": np.full((4, 4), 300), "classes": np.zeros(32)}, "from 0 to 255"),
        (
            "instances",
            {"ids": np.full((4, 4), 40), "classes": np.zeros(32)},
            "reach 40; at most 31",
        ),
        ("mask", {"image": IMAGE}, "image and region .* or image and keep"),
        ("intensity", {"map": IMAGE[..., 0], "weights": [2, 0, 0]}, "sum to 1"),
        ("depth", {"map": IMAGE}, "depth holds object|depth has shape"),
        ("caption", {"text": "a"}, "caption lacks 'ids'"),
    ],
)
def test_stored_values_that_are_none_are_named(name, stored, message):
    with pytest.raises(ValueError, match=message):
        conditions.get(name).checked(stored)


def test_names_of_conditions_are_a_list_or_text_with_commas():
    image = np.zeros((8, 8, 3), np.uint8)
    found = decompose(image, only="intensity,palette")
    assert list(found) == list(decompose(image, only=["intensity", "palette"]))
    with pytest.raises(ValueError, match=r"no condition 'skech' .did you mean 'sketch'"):
        decompose(image, only="skech")
