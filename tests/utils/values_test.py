"""Values are read from text as what they may be says."""

from __future__ import annotations

import pytest

from composer_jax.utils import values


@pytest.mark.parametrize(
    ("allowed", "text", "value"),
    [
        (values.maybe(values.whole(1)), "1", 1),
        (values.maybe(values.whole(1)), "None", None),
        (values.maybe(values.number(0.0, 1.0)), ".5", 0.5),
        (values.maybe(values.text()), "name", "name"),
    ],
)
def test_what_may_be_none_is_read_as_its_kind(allowed, text, value):
    assert allowed.parse("the value", text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "none"])
def test_what_may_be_none_is_checked_as_its_kind(text):
    with pytest.raises(ValueError, match="from 1 to 9, or None, is wanted"):
        values.maybe(values.whole(1, 9)).parse("the value", text)
