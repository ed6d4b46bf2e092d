"""What a run tells is on disk at once, and a disk that is full is said and ends it."""

import json
from contextlib import suppress

import pytest
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboardX.proto.event_pb2 import Event

from composer_jax.training.log import Log
from composer_jax.utils.atomic import WriteError
from tests.disks import file_limit


def events(workdir):
    """The events of the one file that TensorBoard reads, by its own reader."""
    (path,) = (workdir / "tensorboard").iterdir()
    reader, found = PyRecordReader_New(str(path)), []
    with suppress(errors.OutOfRangeError):
        while True:
            reader.GetNext()
            found.append(Event.FromString(reader.record()))
    return found


def test_events_are_what_tensorboard_reads(tmp_path):
    told = Log(tmp_path, 4, 10, 2)
    told.scalars(5, {"loss": 0.5, "grad_norm": 2.0})
    head, start, *scalars = events(tmp_path)
    assert head.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == 1  # what is newer is of an earlier start
    found = [(event.step, event.summary.value[0]) for event in scalars]
    assert [(step, one.tag, one.simple_value) for step, one in found] == [
        (5, "loss", 0.5),
        (5, "grad_norm", 2.0),
    ]
    told.close()


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard/events"])
def test_a_full_disk_ends_a_run_and_leaves_whole_lines(tmp_path, full):
    told = Log(tmp_path, 0, 1000, 2)
    if full == "metrics.jsonl":
        (tmp_path / full).write_text(json.dumps({"step": 0, "padding": "x" * 4000}) + "\n")
    with file_limit(4096), pytest.raises(WriteError, match=f"{full}.* cannot be written: File too"):
        for step in range(1, 1000):
            told.scalars(step, {"loss": 1.0, **{f"share {i}": 0.5 for i in range(12)}})
    told.close()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] < 1000
    assert [event.step for event in events(tmp_path)][-1] == step - 1


def test_a_run_that_goes_on_keeps_the_lines_up_to_its_step_but_damaged_ones(tmp_path, caplog):
    path, line = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 0.5}'
    path.write_bytes(b"\n".join([line, b"\xff", b"[]", line.replace(b"1", b"3")]))
    Log(tmp_path, 2, 10, 2).close()
    assert path.read_bytes() == line + b"\n"
    assert f"{path}: line 2 is damaged" in caplog.text
