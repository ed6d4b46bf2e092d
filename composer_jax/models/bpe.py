"""A byte-pair vocabulary of one's own, in the format of CLIP's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIPTokenizer splits


def build_vocabulary(
    captions: Iterable[str], *, size: int = 2048
) -> tuple[dict[str, int], list[str]]:
    """Learns byte-pair merges from captions (Sennrich et al., arXiv 1508.07909).

    Returns the contents of `vocab.json` (at most `size` tokens: 256 bytes, 256 bytes that end a
    word, one token a merge, the two specials) and of `merges.txt` (lines without the header).
    Deterministic; any text can be written in it, seen in the captions or not.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())  # in CLIP's order
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    endings = [character + "</w>" for character in characters]
    # Endings that the learner met by itself would be numbered in the order of a hash table, and
    # numbers decide between pairs of equal count.
    trainer = trainers.BpeTrainer(
        special_tokens=endings,
        vocab_size=size - 2,
        initial_alphabet=characters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learnt = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = characters + endings
    merges = learnt[: max(size - 2 - len(tokens), 0)]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    tokens += [START, END]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(merge) for merge in merges]
