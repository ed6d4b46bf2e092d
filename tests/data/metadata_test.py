"""Captions as others write them: what is one, what is none, and what is named."""

import csv
import io
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from composer_jax.data.metadata import beside, decoded, described, first_caption

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (" a dog\r\n", "a dog"),
        ("\ufeffa dog", "a dog"),
        ("a dog\u2028on a lawn", "a dog\u2028on a lawn"),
        (b"caf\xc3\xa9", "café"),
        ("café".encode("utf-16"), "café"),
        (np.array(b"a dog"), "a dog"),
        (np.array(["a dog", "a cat"]), "a dog"),
        (np.str_("a dog"), "a dog"),
        (["a dog", "a cat"], "a dog"),
        ([None, "", ["a dog"]], "a dog"),
        ({"text": [b"one", b"two"], "id": [1, 2]}, "one"),  # as TFDS gives coco_captions
        ([{"id": 1, "caption": "a dog"}], "a dog"),
        ({"caption": None, "text": "spare"}, "spare"),
        (None, ""),
        ("", ""),
        (" \u00a0\n", ""),
        ([], ""),
        (np.array([], object), ""),
        (float("nan"), ""),
        (np.float32("nan"), ""),
        ([None, float("nan")], ""),
    ],
)
def test_a_value_is_a_caption_or_none(value, caption):
    assert first_caption([("text", value)]) == (caption, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "is int (5), not text"),
        (np.int64(5), "is int (5), not text"),
        (0.5, "is float"),
        (True, "is bool"),
        (b"caf\xe9", "is not UTF-8 (byte 0xe9 at 3)"),
        ({"en": "a dog"}, "is dict without caption or captions or text"),
        ("half a pair \ud83d", "half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named_and_the_next_one_taken(value, reason):
    for candidates in ([("text", value), ("a.txt", "spare")], [("text", [value, "spare"])]):
        caption, (wrong,) = first_caption(candidates)
        assert caption == "spare" and wrong.startswith("text ") and reason in wrong
    assert first_caption([("text", value)])[0] == ""


def test_files_that_cannot_be_read_are_named():
    def gone():
        raise FileNotFoundError(2, "No such file")

    def broken():
        return beside(".json", b"{broken")

    caption, wrong = first_caption([("a.txt", gone), ("a.json", broken), ("more", "words")])
    assert caption == "words" and len(wrong) == 2
    assert "a.txt cannot be read: No such file" in wrong[0] and "a.json is not JSON" in wrong[1]


def test_json_beside_an_image():
    read = [beside(".json", json.dumps(v).encode()) for v in ({"width": 3}, "a dog", ["a dog"])]
    assert [first_caption([("a.json", value)]) for value in read] == [
        ("", []),
        ("a dog", []),
        ("a dog", []),
    ]
    assert decoded("a dog".encode("utf-8-sig")) == "a dog"


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode("utf-8-sig")


def as_parquet(rows):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def table(name, content, files=("a.png", "b.png", "s/a.png")):
    """{file: caption} and the files that are put aside."""
    found = described("source", {name: lambda: io.BytesIO(content)}, set(files))
    return {file: first_caption([value])[0] for file, value in found.captions.items()}, found.aside


@pytest.mark.parametrize(
    ("kind", "write"), [("jsonl", as_jsonl), ("csv", as_csv), ("parquet", as_parquet)]
)
def test_tables_of_every_kind_say_the_same(kind, write):
    rows = [
        {"file_name": "./a.png", "text": "a dog,\non a\u2028lawn", "depth_file_name": "b.png"},
        {"file_name": "s\\a.png", "text": None, "depth_file_name": None},
    ]
    captions, aside = table(f"metadata.{kind}", write(rows))
    assert captions == {"a.png": "a dog,\non a\u2028lawn", "s/a.png": ""}
    assert aside == {"b.png"}
    inside, _ = table(f"s/metadata.{kind}", write([{"image_file_name": "a.png", "caption": "x"}]))
    assert inside == {"s/a.png": "x"}


def test_csv_as_pandas_reads_it():
    content = b'file_name, text\r\na.png,None\r\nb.png, "a dog, on a lawn"\r\n'
    assert table("metadata.csv", content)[0] == {"a.png": "", "b.png": "a dog, on a lawn"}


def test_a_row_of_a_csv_may_end_early(caplog):
    assert table("metadata.csv", b"file_name,text\na.png\n")[0] == {"a.png": ""}
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file": "a.png"}', "line 1 needs file_name or image_file_name"),
        ("metadata.jsonl", b'\n{"file_name": "a.png"', "line 2 is not JSON"),
        ("metadata.jsonl", b'["a.png"]', "line 1: a JSON object is wanted"),
        ("metadata.jsonl", b'{"file_name": null}', "line 1: file_name is None"),
        ("metadata.jsonl", b'{"file_name": 5}', "line 1: file_name is 5"),
        ("metadata.jsonl", b'{"x_file_name": "a", "y_file_name": "b"}',
         "which of x_file_name, y_file_name is the image"),
        ("metadata.csv", b"file_name;text\na.png;a dog\n", "needs file_name"),
        ("metadata.csv", b"file_name,text\na.png,a dog, on a lawn\n", "3 values for 2 columns"),
        ("metadata.csv", b'file_name,text\na.png,"a dog\nb.png,x\n', "line 3: unexpected end"),
        ("metadata.csv", b"file_name,text,text\na.png,a,b\n", "names a column twice"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "is not UTF-8"),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000, "field larger"),
        ("metadata.parquet", b"PAR1", "is not Parquet"),
        ("metadata.parquet", as_parquet([{"name": "a.png", "text": "x"}]), "it has name, text"),
    ],
)  # fmt: skip
def test_broken_tables_are_named_with_the_line(name, content, message):
    with pytest.raises(ValueError) as error:
        table(name, content)
    assert name in str(error.value) and message in str(error.value)


def test_what_tables_say_twice_or_of_nothing_is_told(caplog):
    rows = [{"file_name": "a.png", "text": t} for t in ("one", "two")]
    rows += [{"file_name": f"{i}.png", "text": "x"} for i in range(5)]
    assert table("metadata.jsonl", as_jsonl(rows))[0] == {"a.png": "one"}
    assert "names 1 file (a.png) more than once; the first row counts" in caplog.text
    assert "names 5 files (0.png, 1.png, 2.png and 2 more), not there" in caplog.text
    table("metadata.jsonl", as_jsonl([{"file_name": "a.png", "prompt": "x"}]))
    assert "has no caption or captions or text" in caplog.text and "prompt" in caplog.text


def test_the_nearest_table_counts_and_two_in_a_folder_are_refused():
    def rows(text, name="a.png"):
        return lambda: io.BytesIO(as_jsonl([{"file_name": name, "text": text}]))

    tables = {"metadata.jsonl": rows("far", "s/a.png"), "s/metadata.jsonl": rows("near")}
    assert described("source", tables, {"s/a.png"}).captions["s/a.png"][1] == {"text": "near"}
    with pytest.raises(ValueError, match=r"s/metadata.csv and s/metadata.jsonl; only one"):
        described("source", {**tables, "s/metadata.csv": rows("x")}, {"s/a.png"})
