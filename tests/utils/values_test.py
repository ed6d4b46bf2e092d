"""Values are read from text as what they may be says."""

from __future__ import annotations

import pytest

from composer_jax.utils import values
from composer_jax.utils.values import expand_user


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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("~", "/home/me"),
        ("~/a b.png", "/home/me/a b.png"),
        ("folder:~/photos", "folder:/home/me/photos"),
        ("0.7*cache:~/a+0.3*cache:~/b", "0.7*cache:/home/me/a+0.3*cache:/home/me/b"),
        ("a.png:region=~/b.png", "a.png:region=/home/me/b.png"),
        ("--out=~/x", "--out=/home/me/x"),
        ({"source": ["seed=0", "pools=~/p"]}, {"source": ["seed=0", "pools=/home/me/p"]}),
        *((same, same) for same in ("a~/b", "x~", "~nobody-here/a", "~5 dogs", "a ~/b", 3, None)),
    ],
)
def test_the_home_folder_where_a_path_may_begin(text, says, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user(text) == says
