"""CLIP's token ids: those of transformers' fast tokenizer, whatever files hold the vocabulary."""

import json
import shutil

import numpy as np
import pytest
import transformers

from composer_jax.models.clip_tokenizer import CutTexts, Tokenizer
from composer_jax.storage.models import BUNDLED

# what transformers' two sets of rules read differently comes first
TEXTS = [
    "中文字符猫 cat中文", "日本語 ｶﾀｶﾅ", "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "soft\u00adhyphen", "zero\u200bwidth\u200cnon\u200djoiner", "a\x00b\x01c\x7f d", "\ufeffbom",
    "ΟΔΟΣ ς", "\x1cfile\x1f", "\U0001f3f3\ufe0f\u200d\U0001f308", "\u202e\u05e9\u05dc\u05d5\u05dd",
    "", " ", "A  PHOTO\tof\r\n\na Cat\x85\xa0\u3000.", "naïve café", "nai\u0308ve cafe\u0301",
    "İstanbul ß ẞ ﬁ Å", "12345 3.14 ½ ² Ⅳ ٣", "it's we're I'VE don\u2019t 'twas ''s", "“a” … ?!",
    "हिन्दी ไทย", "a</w>b", "x<|endoftext|>y <|STARTOFTEXT|>", "word " * 99, "a" * 5000,
]  # fmt: skip
LENGTH = 77


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A directory with vocab.json and merges.txt alone, as transformers 4 may leave one."""
    folder = tmp_path_factory.mktemp("split")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(BUNDLED / "clip" / name, folder / name)
    return folder


def changed(folder, target, **files):
    """A copy of a directory with other JSON files, None for one that is to go."""
    shutil.copytree(folder, target)
    for name, values in files.items():
        path = target / f"{name}.json"
        path.unlink() if values is None else path.write_text(json.dumps(values))
    return target


def test_ids_do_not_depend_on_which_files_there_are(split, tmp_path):
    read = Tokenizer.load(split)
    read.save(tmp_path, LENGTH)
    together = Tokenizer.load(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    alone = Tokenizer.load(tmp_path)
    for other in (together, alone):
        assert other.encode(TEXTS, LENGTH) == read.encode(TEXTS, LENGTH)
        assert other.fingerprint() == read.fingerprint()


def test_ids_are_the_fast_tokenizers_before_and_after_export(split, tmp_path):
    read = Tokenizer.load(split)
    read.save(tmp_path, LENGTH)
    rows = read.encode(TEXTS, LENGTH)[0]
    assert "tokenizer.json" in {path.name for path in tmp_path.iterdir()}
    peer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    for text, row in zip(TEXTS, rows, strict=True):
        assert peer(text, truncation=True, max_length=LENGTH)["input_ids"] == row, text


@pytest.mark.parametrize("role", ["tokenizer_config", "special_tokens_map"])
def test_a_padding_that_files_name_is_found_in_texts_as_in_the_peer(split, tmp_path, role):
    folder = changed(split, tmp_path / "pad", **{role: {"pad_token": "!"}})
    read = Tokenizer.load(folder)
    peer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    assert read.special["pad_token"] == peer.pad_token == "!"
    assert read.encode(["hello! !!"], LENGTH)[0][0] == peer("hello! !!")["input_ids"]


def test_added_tokens_are_matched_whole(split, tmp_path):
    plain = Tokenizer.load(split)
    first = plain.largest + 1
    folder = changed(split, tmp_path / "toy", added_tokens={"<cat-toy>": first})
    read = Tokenizer.load(folder)
    assert read.encode(["a <cat-toy>!"], LENGTH)[0][0][2] == first == read.largest
    assert read.fingerprint() != plain.fingerprint()
    read.save(tmp_path / "toy", LENGTH)
    again = Tokenizer.load(tmp_path / "toy")
    assert again.encode(["a <cat-toy>!"], LENGTH) == read.encode(["a <cat-toy>!"], LENGTH)
    assert again.fingerprint() == read.fingerprint()
    with pytest.raises(ValueError, match=f"'<cat-toy>' is numbered {first + 5}"):
        Tokenizer.load(changed(split, tmp_path / "far", added_tokens={"<cat-toy>": first + 5}))


def whole(**model):
    return {
        "model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"} | model
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": whole(vocab={"a": 0})}, "another vocabulary or other merges"),
        ({"tokenizer": whole(type="Unigram")}, "not of CLIP's tokenizer: its model is Unigram"),
        ({"tokenizer": whole(end_of_word_suffix="")}, "not of CLIP's tokenizer"),
        ({"tokenizer": {"model": 3}}, r"tokenizer\.json is broken"),
        ({"vocab": {"a": 0, "b": 1}}, "the vocabulary does not fit the merges"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "the vocabulary lacks <end>"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other_are_refused(split, tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(changed(split, tmp_path / "broken", **files))


def test_what_is_left_out_of_a_text_is_the_rest_of_its_words(split):
    read = Tokenizer.load(split)
    rows, left = read.encode(["red ball", "Red  ball blue cube"], 5)
    assert left == ["", "cube"]
    assert [len(row) for row in rows] == [4, 5] and rows[1][-1] == read.end
    assert rows[1] == read.encode(["red ball blue"], 5)[0][0]


def test_lone_surrogates_are_replaced(split):
    read = Tokenizer.load(split)
    assert read.encode(["a\ud83d", "\ud83d\ude00"], LENGTH) == read.encode(
        ["a\ufffd", "😀"], LENGTH
    )


def test_one_line_says_what_was_cut():
    cut = CutTexts()
    assert cut.message(77) == ""
    cut.add(["a long prompt"], ["prompt"])
    assert "77 tokens that CLIP reads; left out: 'prompt'" in cut.message(77)
    cut.add(["b", "c d", "e f"], ["", "d", "f"])
    assert cut.message(77).startswith("3 of 4 captions have more than the 77 tokens")
    assert "of 'a long prompt' this is left out: 'prompt'" in cut.message(77)
    cut.clear()
    cut.add(["x" * 9000], ["x" * 8000])
    assert len(cut.message(77)) < 500


def test_a_prompt_that_is_cut_is_said_once(tmp_path, caplog):
    from composer_jax import conditions
    from composer_jax.models.clip import Clip

    clip, caption = Clip.load(BUNDLED / "clip"), conditions.get("caption")
    with caplog.at_level("WARNING", "composer_jax"):
        caption.parse("a red cone", clip)
        assert not caplog.records
        caption.parse("red " * 46 + "and a blue ball", clip)
        (record,) = caplog.records
        assert (
            "longer than the 48 tokens that CLIP reads; left out: 'and a blue ball'"
            in record.message
        )
        caption.extract(
            np.zeros((3, 8, 8, 3), np.uint8), {"caption": ["red " * 60, "b", "c"]}, clip
        )
        clip.report_cut()
        assert "1 of 3 captions have more" in caplog.records[1].message
        clip.report_cut()
    assert len(caplog.records) == 2
