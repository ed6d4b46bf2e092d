"""A folder's description of its call: read, compared, refused by name where it is damaged."""

import pytest

from composer_jax.utils.atomic import write_json
from composer_jax.utils.claims import differing, plain, read_claim

pytestmark = pytest.mark.fast


def test_a_call_is_found_again(tmp_path):
    call = {"seed": 1, "window": (0, 0.5), "model": None}
    assert read_claim(tmp_path / "call.json") is None
    write_json(tmp_path / "call.json", call)
    assert read_claim(tmp_path / "call.json") == plain(call)
    assert differing(plain(call), plain(call)) is None


def test_the_first_key_that_differs_is_named():
    old, new = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "d": 4}
    assert differing(old, new) == "b"
    assert differing(old, new, may=lambda key: key == "b") == "c"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1', b"[" * 9999])
def test_a_damaged_one_is_named_with_what_to_do(tmp_path, content):
    path = tmp_path / "call.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"call\.json is damaged.*delete it"):
        read_claim(path, "delete it")
