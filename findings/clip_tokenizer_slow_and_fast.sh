#!/usr/bin/env bash
# CLIPTokenizer and CLIPTokenizerFast give different ids for one text from one folder.
#
# Versions: transformers 4.57.6, tokenizers 0.22.2; ftfy not installed.
# First guess: the two are one tokenizer in Python and in Rust, so their ids are equal for any text.
# Seen: equal for ASCII and accented letters. The slow one drops a soft hyphen and joins what it
# parted, where the fast one splits the word there and keeps its bytes; the slow one splits Chinese
# text at each character, where the fast one keeps a run of characters together as one word.
# The script fails where any of these texts is tokenized otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  transformers==4.57.6 tokenizers==0.22.2
cat > "$folder/tokens.py" <<'PY'
import json
import pathlib
import sys

from transformers import CLIPTokenizer, CLIPTokenizerFast, __version__
from transformers.models.clip.tokenization_clip import bytes_to_unicode

folder = pathlib.Path(sys.argv[1])
letters = list(bytes_to_unicode().values())
words = letters + [x + "</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"]
(folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
slow, fast = (kind.from_pretrained(folder) for kind in (CLIPTokenizer, CLIPTokenizerFast))
equal = {}
for text in ("hello!", "caf\u00e9", "co\u00adop", "\u4f60\u597d"):
    tokens = slow.tokenize(text), fast.tokenize(text)
    equal[text] = slow(text).input_ids == fast(text).input_ids
    print(f"transformers {__version__}: {text!r}: {tokens[0]} slow, {tokens[1]} fast")
assert list(equal.values()) == [True, True, False, False], "the tokenizers differ otherwise"
assert slow.tokenize("co\u00adop") == slow.tokenize("coop"), "the slow one keeps a soft hyphen"
PY
"$folder/venv/bin/python" "$folder/tokens.py" "$folder"
