"""A series of images goes on where it stopped, and never mixes two calls."""

import numpy as np
import pytest

from composer_jax.diffusion import use
from composer_jax.storage.series import Series, describe_uses

pytestmark = pytest.mark.fast

CALL = {"seed": 0, "guidance": 2.0, "caption": ["red"]}
IMAGE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


def test_it_goes_on_at_the_first_that_is_missing(tmp_path):
    series = Series(tmp_path / "out", CALL)
    assert series.first == 0
    for i in (0, 1, 3):  # 2 was never finished
        series.add(i, IMAGE + i)
    (tmp_path / "out" / "0002.new").write_bytes(b"half a picture")
    again = Series(tmp_path / "out", CALL)
    assert again.first == 2
    again.add(2, IMAGE + 2)
    np.testing.assert_array_equal(again.images(3), [IMAGE, IMAGE + 1, IMAGE + 2])


def test_another_call_is_refused_by_what_differs(tmp_path):
    Series(tmp_path, CALL).add(0, IMAGE)
    with pytest.raises(ValueError, match="another guidance; give another --out"):
        Series(tmp_path, {**CALL, "guidance": 3.0})
    with pytest.raises(ValueError, match="another sketch"):
        Series(tmp_path, {**CALL, "sketch": []})
    (tmp_path / "call.json").unlink()
    with pytest.raises(ValueError, match="another call"):
        Series(tmp_path, CALL)


def test_a_use_is_described_by_all_that_it_says():
    lines = np.zeros((8, 8), np.uint8)
    one = describe_uses({"sketch": [use(lines)]})
    assert one == describe_uses({"sketch": [use(lines.copy())]})
    for other in (
        use(lines + 1),
        use(lines, strength=0.5),
        use(lines, window=(0, 0.5)),
        use(lines, region=np.ones((2, 2))),
        use(lines, negative=True),
        use({"map": lines}),
    ):
        assert one != describe_uses({"sketch": [other]})
