"""A log is read as far as it can be: a damaged line is named and left out."""

import pytest

from composer_jax.storage.metrics import read_metrics

pytestmark = pytest.mark.fast
LINE = b'{"step": 1, "loss": 0.5}'


@pytest.mark.parametrize(
    "damage", [b"[]", b"5", b"{}", b'{"step": "x"}', b'{"step": 1, "loss": []}', b"\xff", LINE[:9]]
)
def test_a_damaged_line_is_named_and_left_out(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINE, damage, LINE]))
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}] * 2
    assert f"{path}: line 2 is damaged and left out" in caplog.text


def test_an_empty_log_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert read_metrics(path) == [] and f"{path} is empty" in caplog.text
