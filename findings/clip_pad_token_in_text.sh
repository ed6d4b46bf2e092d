#!/usr/bin/env bash
# A CLIP tokenizer that pads with "!" gives each "!" of a text the padding's id.
#
# Versions: transformers 4.57.6, tokenizers 0.22.2.
# First guess: pad_token "!" only names the id that fills a row (as in Stable Diffusion 2's
# tokenizer), so "hello!" still ends in the word's own token, "!</w>".
# Seen: a pad_token is a special token, and those are cut out of a text before it is tokenized. The
# "!" of "hello!" becomes "!", id 0, the padding's, not "!</w>", id 256, in both CLIPTokenizer and
# CLIPTokenizerFast. A mask made by comparing ids with pad_token_id loses that token.
# The script fails where the "!" of the text gets another id.
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
for kind in (CLIPTokenizer, CLIPTokenizerFast):
    usual, padded = kind.from_pretrained(folder), kind.from_pretrained(folder, pad_token="!")
    ids = [tokenizer("hello!").input_ids[-2] for tokenizer in (usual, padded)]
    print(f"transformers {__version__}, {kind.__name__}: {ids}, padding {padded.pad_token_id}")
    assert ids == [words.index("!</w>"), padded.pad_token_id], "the mark gets another id"
PY
"$folder/venv/bin/python" "$folder/tokens.py" "$folder"
