"""CLIP's tokenizer: always the rules of transformers' fast one, whatever files a directory holds.

transformers 4 has two sets of rules, which differ for Chinese characters, joiners, soft hyphens
and control characters; which one runs depends on class and files. Here they are built once, from a
vocabulary and its merges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_jax.models.bpe import END, START, WORDS
from composer_jax.models.files import member, read_json
from composer_jax.utils.atomic import write_json, write_text

FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))  # either is enough
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
RULES = "fast-1"  # version of the rules that `Tokenizer` builds
HEADER = "#version"
MOST_MERGES = 49152 - 256 - 2  # CLIP's own; transformers reads no more of a merges.txt
SHOWN = 300  # characters of a text in a message


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts to token ids by the fast rules (transformers' CLIPTokenizerFast).

    `vocabulary`: ids by token; `merges`: lines of merges.txt; `special`: tokens by role (bos_token,
    eos_token, unk_token, pad_token), which are also found inside a text; `added`: further tokens
    that are matched whole, such as those of textual inversion. `core`: the same in `tokenizers`.
    Raises ValueError where they contradict each other.
    """

    vocabulary: Mapping[str, int]
    merges: Sequence[str]
    special: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    core: Any = field(init=False, repr=False)

    def __post_init__(self):
        roles = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        object.__setattr__(self, "special", roles | dict(self.special))
        object.__setattr__(self, "core", self._build())

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """From vocab.json and merges.txt, or tokenizer.json; raises ValueError, one line, where
        they are broken, not CLIP's, or say different things."""
        split = all(member(folder, name).is_file() for name in FILES[0])
        whole = member(folder, FILES[1][0])
        vocabulary, merges, added = _read_whole(whole) if whole.is_file() else ({}, [], {})
        if split:
            pair = read_json(folder / FILES[0][0]), _read_merges(folder / FILES[0][1])
            known = {**vocabulary, **added}
            if whole.is_file() and (merges != pair[1] or not pair[0].items() <= known.items()):
                raise ValueError(
                    f"{folder}: tokenizer.json has another vocabulary or other merges than "
                    "vocab.json and merges.txt; remove what the model was not trained with"
                )
            vocabulary, merges = pair
        config, roles = (
            read_json(folder / name) if member(folder, name).is_file() else {} for name in SETTINGS
        )
        if "added_tokens_decoder" not in config:  # older files: the map has the last word
            config = config | roles
        special = {role: _content(config[role]) for role in ROLES if config.get(role)}
        more = member(folder, "added_tokens.json")
        added |= read_json(more) if more.is_file() else {}
        declared = config.get("added_tokens_decoder", {})
        added |= {_content(token): int(number) for number, token in declared.items()}
        own = {*special.values(), START, END}
        added = {t: n for t, n in added.items() if t not in own or vocabulary.get(t) != n}
        return Tokenizer(vocabulary, merges, special, added)

    def _build(self):
        from tokenizers import (
            AddedToken,
            Regex,
            decoders,
            models,
            normalizers,
            pre_tokenizers,
            processors,
        )
        from tokenizers import Tokenizer as Core

        pairs = [tuple(merge.split()) for merge in self.merges]
        try:
            model = models.BPE(
                dict(self.vocabulary), pairs, continuing_subword_prefix="",
                end_of_word_suffix="</w>", fuse_unk=False, unk_token=self.special["unk_token"],
            )  # fmt: skip
        except Exception as error:  # of no class of its own
            raise ValueError(f"the vocabulary does not fit the merges: {error}") from error
        core = Core(model)
        space = normalizers.Replace(Regex(r"\s+"), " ")
        core.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        special, known = {*self.special.values()}, {**self.vocabulary, **self.added}
        if absent := special - known.keys():
            raise ValueError(f"the vocabulary lacks {', '.join(sorted(absent))}")
        for token in sorted(special | self.added.keys(), key=known.get):
            core.add_tokens([AddedToken(token, normalized=True, special=token in special)])
            if core.token_to_id(token) != known[token]:
                raise ValueError(
                    f"the added token {token!r} is numbered {known[token]}; after its vocabulary, "
                    f"{core.token_to_id(token)} is wanted"
                )
        start, end = ((self.special[r], core.token_to_id(self.special[r])) for r in ROLES[:2])
        # offsets untrimmed, no space before; tokenizers 0.23 takes these by place alone
        core.post_processor = processors.RobertaProcessing(end, start, False, False)
        return core

    def id(self, token: str) -> int | None:
        """The id of a token, None where there is none."""
        return self.core.token_to_id(token)

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(self.core.get_vocab().values())

    @property
    def end(self) -> int:
        """The id that ends a text."""
        return self.id(self.special["eos_token"])

    def encode(self, texts: Sequence[str], length: int) -> tuple[list[list[int]], list[str]]:
        """Ids of each text, at most `length` with start and end, and what of the text is left out,
        "" where nothing is."""
        start, room = self.id(self.special["bos_token"]), length - 2
        rows, left = [], []
        texts = [_whole_characters(text) for text in texts]
        found = self.core.encode_batch(texts, add_special_tokens=False)
        for text, one in zip(texts, found, strict=True):
            rows.append([start, *one.ids[:room], self.end])
            left.append(text[one.offsets[room][0] :] if len(one.ids) > room else "")
        return rows, left

    def fingerprint(self) -> str:
        """What ids depend on, as a short text: the rules' version and a hash of the vocabulary."""
        parts = [dict(self.vocabulary), list(self.merges), self.special, dict(self.added)]
        text = json.dumps(parts, sort_keys=True)
        return f"{RULES}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def save(self, folder: Path, length: int) -> None:
        """Writes all of FILES and SETTINGS: what every tokenizer of transformers 4 and 5 opens."""
        self.core.save(str(folder / "tokenizer.json"))
        write_json(folder / "vocab.json", self.vocabulary)
        lines = "\n".join([f"{HEADER}: 0.2", *self.merges]) + "\n"
        write_text(folder / "merges.txt", lines)
        if more := {t: n for t, n in self.added.items() if t not in self.vocabulary}:
            write_json(folder / "added_tokens.json", more)
        write_json(folder / SETTINGS[1], self.special)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length,
                  "errors": "replace", "clean_up_tokenization_spaces": False}  # fmt: skip
        write_json(folder / SETTINGS[0], config | dict(self.special))


def _read_whole(path: Path) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Vocabulary, merges and added tokens of a tokenizer.json."""
    content = read_json(path)
    try:
        model = content["model"]
        if model.get("end_of_word_suffix") != "</w>" or model.get("type", "BPE") != "BPE":
            raise ValueError(f"{path} is not of CLIP's tokenizer: its model is {model.get('type')}")
        merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
        added = {one["content"]: int(one["id"]) for one in content.get("added_tokens") or ()}
        return {**model["vocab"]}, merges, added
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is broken: {error!r}") from error


def _read_merges(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    lines = lines[lines[0].startswith(HEADER) :]
    merges = [" ".join(line.split()) for line in lines if line.strip()][:MOST_MERGES]
    wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
    if wrong is not None:
        raise ValueError(f"{path} is broken: {wrong[:60]!r} is no pair of tokens")
    return merges


def _content(token: Any) -> str:
    """A token's text: settings hold it alone or with how it is matched."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _whole_characters(text: str) -> str:
    """The text with lone halves of surrogate pairs, which no file can hold, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class CutTexts:
    """Counts texts that were longer than a CLIP reads, for one line about all of them."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forgets what was counted."""
        self.seen, self.count, self.example = 0, 0, ("", "")

    def add(self, texts: Sequence[str], left: Sequence[str]) -> None:
        """Counts texts, and what was left out of each, "" where nothing was."""
        self.seen += len(texts)
        for text, rest in zip(texts, left, strict=True):
            if rest:
                self.example = self.example if self.count else (text, rest)
                self.count += 1

    def message(self, length: int) -> str:
        """One line, "" where nothing was cut; `length` in tokens."""
        if not self.count:
            return ""
        text, rest = (_shown(part) for part in self.example)
        if self.seen == 1:
            return (
                f"the caption is longer than the {length} tokens that CLIP reads; left out: {rest}"
            )
        return (
            f"{self.count} of {self.seen} captions have more than the {length} tokens that CLIP "
            f"reads and were cut; of {text} this is left out: {rest}"
        )


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]} ...")
