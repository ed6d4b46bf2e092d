"""Caption: what a sentence says, as CLIP reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.conditions.base import Condition, Feature, Part, register

FACTS = ("shape", "colour", "size", "count", "relation")  # what a reader tells apart
FILES = (".txt", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SIDE, _MARGIN = 256, 12  # pixels of a rendered caption


class Caption(Condition):
    """CLIP's word and sentence embeddings of a text. The tool is a CLIP with `text` and `image`,
    and `report_cut` where it counts the texts that it cuts.

    `blend` goes along the sphere for the sentence and straight from word to word at each position.
    """

    name = "caption"
    doc = "a sentence that says what is in the image"
    parts: Mapping[str, Part] = {
        "tokens": Part("tokens", ("text_length", "text_width")),
        "vector": Part("vector", ("embed_width",), norm=1.0),
    }
    feature: Mapping[str, Feature] = {
        "text": Feature((), "str", "text"),
        "ids": Feature(("text_length",), "int32", "raw"),
        "tokens": Feature(("text_length", "text_width"), "float32", "raw"),
        "vector": Feature(("embed_width",), "float32", "raw"),
    }
    tool = "clip"
    judged_by = "reader"

    def extract(self, images, given=None, tool=None) -> dict[str, Any]:
        """Encodes `given["caption"]` (B texts): "text" a list of B, "ids", "tokens", "vector".

        Raises ValueError where the source gives no captions, or another number, or no CLIP is
        there.
        """
        texts = given.get("caption") if given is not None else None
        if texts is None:
            raise ValueError(
                "caption needs texts given by the source (metadata.jsonl, metadata.csv or a .txt "
                "beside each image), or one by hand"
            )
        texts = [str(text) for text in texts]
        if len(texts) != len(images):
            raise ValueError(f"caption: {len(texts)} texts for {len(images)} images")
        return {"text": texts, **_needed(tool).text(texts)}

    def value(self, stored) -> dict[str, jax.Array]:
        """{"tokens": float32 [L, D], "vector": float32 [E]}."""
        return {name: jnp.asarray(stored[name], jnp.float32) for name in self.parts}

    def parse(self, text, tool=None) -> dict[str, Any]:
        """Encodes one sentence: a str, the content of a .txt file, or a stored example, as
        `unpacked` takes it.

        Raises ValueError where it is nothing of that, names a picture, or there is no CLIP.
        """
        stored = self.unpacked(text, tool)
        if stored is not None:
            return stored
        if isinstance(text, os.PathLike) or (isinstance(text, str) and _is_file(text)):
            text = read_sentence(Path(text))
        elif isinstance(text, str) and text.lower().endswith(".npy"):
            raise ValueError(f"{text} holds no caption as `composer decompose` writes it")
        if not isinstance(text, str):
            raise ValueError(f"caption takes a sentence (str), not {type(text).__name__}")
        return _encoded(text, tool)

    def unpacked(self, source, tool=None) -> dict[str, Any] | None:
        """As of any condition, the text encoded anew: another CLIP may have taken it. Without a
        text, or a CLIP, what is stored is taken as it is."""
        stored = super().unpacked(source)
        if stored is None:
            return None
        if tool is None or "text" not in stored:
            return self.checked(stored, getattr(tool, "sizes", {}))
        return _encoded(stored["text"], tool)

    def absent(self, tool=None) -> dict[str, Any]:
        """The encoded empty caption: what stands where no caption is given."""
        return self.parse("", tool)

    def render(self, stored) -> np.ndarray:
        """The text, wrapped, black on white, uint8 [256, 256, 3]; shrunk until it fits."""
        from PIL import Image, ImageDraw, ImageFont

        text = " ".join(str(stored["text"]).split())[:2000]  # more is not legible anyway
        page = Image.new("RGB", (_SIDE, _SIDE), "white")
        draw = ImageDraw.Draw(page)
        room = _SIDE - 2 * _MARGIN
        for size in (28, 22, 18, 14, 11, 8, 6):
            font = ImageFont.load_default(size)
            lines = "\n".join(_wrap(text, lambda line, font=font: font.getlength(line) <= room))
            box = draw.multiline_textbbox((_MARGIN, _MARGIN), lines, font=font)
            if box[3] <= _SIDE - _MARGIN:
                break
        draw.multiline_text((_MARGIN, _MARGIN), lines, font=font, fill="black")
        return np.asarray(page)

    def measure(self, wanted, image, tool=None) -> float:
        """How far the text is true of the image, by a reader: a tool with `agreement`.

        With a CLIP instead the cosine between the sentence's and the image's embeddings, in
        [-1, 1], unscaled: OpenAI's models give true pairs of photo and caption about 0.3, so it is
        to be read beside its oracle. An empty text says nothing: nan. Raises ValueError without
        either tool.
        """
        if not str(wanted.get("text", "?")).strip():
            return float("nan")
        if hasattr(tool, "agreement"):
            return tool.agreement(str(wanted["text"]), np.asarray(image))
        return float(np.dot(wanted["vector"], _needed(tool).image(np.asarray(image)[None])[0]))

    def beside(self, rows):
        """The share of each kind of stated fact that is found, where the tool is a reader."""
        del rows

        def share(fact: str):
            def measure(row, image, tool=None) -> float:
                if not hasattr(tool, "agreement"):
                    return float("nan")
                return tool.agreement(str(row[self.name]["text"]), np.asarray(image), (fact,))

            return measure

        return {fact: share(fact) for fact in FACTS}


def _encoded(text: str, tool) -> dict[str, Any]:
    encoded = _needed(tool).text([text])
    if hasattr(tool, "report_cut"):
        tool.report_cut()
    return {"text": text, **{name: array[0] for name, array in encoded.items()}}


def read_sentence(path: Path) -> str:
    """What a .txt file says. Raises ValueError where it is none, or no text in UTF-8."""
    if path.suffix.lower() != ".txt":
        raise ValueError(f"{path} is no sentence; give the words, a .txt or the .npy of a caption")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _is_file(text: str) -> bool:
    """Whether words are the name of a file: one that is there, or that nobody would say."""
    if not text.lower().endswith(FILES):
        return False
    return not re.search(r"\s", text) or os.path.isfile(text)


def _wrap(text: str, fits) -> list[str]:
    """Lines that fit, broken at spaces; a word that fits nowhere is broken inside."""
    lines = [""]
    for word in text.split(" "):
        if fits(f"{lines[-1]} {word}".strip()):
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
    return lines if lines[0] else lines[1:] or [""]


def _needed(tool):
    if tool is None:
        raise ValueError("caption needs a CLIP passed as tool (a directory or a hub name)")
    return tool


register(Caption())
