"""A dataset of TensorFlow Datasets as a source: which feature is the image, which its caption."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.conditions.base import meant
from composer_jax.conditions.image import decode_image, load_image
from composer_jax.data.metadata import CAPTIONS
from composer_jax.data.sources import Crop, Images

log = logging.getLogger("composer_jax")
FIELDS = ("image", "caption")


class Tfds(Images):
    """A dataset of TensorFlow Datasets, stored as ArrayRecord: its image and its caption or label.

    `text`: NAME[:split], or the folder of a prepared one; with "#image=KEY,caption=KEY", or one of
    both, for a dataset that does not say itself which of its features are meant.
    """

    def __init__(self, text: str, *, size: int, crop: Crop):
        from composer_jax.data.tensorflow import tfds

        super().__init__(f"tfds:{text}", size, crop)
        dataset, asked = _asked(text)
        name, _, split = dataset.partition(":")
        library = tfds()

        def opened(call, *args, **options):
            try:
                return call(*args, **options)
            except Exception as error:  # the library raises whatever it likes
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
                raise ValueError(
                    f"source tfds:{text}: {type(error).__name__} {reason}; a dataset that is "
                    "prepared as array_record is wanted, by its name or its folder, and one of its "
                    "splits"
                ) from error

        is_folder = Path(name).is_dir()
        builder = opened(library.builder_from_directory if is_folder else library.builder, name)
        features, supervised = builder.info.features, builder.info.supervised_keys
        try:
            self.fields = choose(library.features, features, supervised, asked)
        except ValueError as error:
            raise ValueError(f"source tfds:{text}: {error}") from None
        image = library.features.Image
        own = self.fields["image"]
        self._encoded = features[own].np_dtype in (np.uint8, np.uint16)  # floats are packed as PNG
        skipped = [
            key
            for key, feature in features.items()
            if isinstance(feature, image) and (key != own or self._encoded)
        ]
        decoders = {key: library.decode.SkipDecoding() for key in skipped}
        self._rows = opened(builder.as_data_source, split=split or "train", decoders=decoders)
        caption = self.fields["caption"]
        if caption is None:
            held = _list(features)
            log.warning("%s has no caption or label; #caption=KEY names one of %s", self.name, held)
        is_label = caption and isinstance(features[caption], library.features.ClassLabel)
        self._names = features[caption].names if is_label else None

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, index: int) -> str:
        """Its number."""
        return f"example {index}"

    def load(self, index: int) -> tuple[np.ndarray, list[tuple[str, Any]]]:
        """Image, and what may be its caption; raises ValueError for a broken record."""
        try:
            row = self._rows[index]
        except Exception as error:
            raise ValueError(f"example {index}: {error}") from error
        image, caption = row[self.fields["image"]], self.fields["caption"]
        if self._encoded:  # the library's decoder knows no colour profile and no orientation
            image = decode_image(bytes(image), self.label(index))
        else:
            image = load_image(np.asarray(image))
        if caption is None:
            return image, []
        value = row[caption]
        if self._names is not None:  # -1 stands for an example without a label
            known = 0 <= int(value) < len(self._names)
            value = self._names[int(value)].replace("_", " ") if known else None
        return image, [(caption, value)]


def _asked(text: str) -> tuple[str, dict[str, str]]:
    """(dataset, what is asked of which field)."""
    dataset, mark, rest = text.rpartition("#")
    if not mark:
        return text, {}
    parts = [part.partition("=")[::2] for part in rest.split(",")]
    asked = dict(parts)
    if len(asked) < len(parts):
        raise ValueError(f"source tfds:{text} names a field twice")
    for field, key in asked.items():
        if field not in FIELDS or not key:
            raise ValueError(
                f"source tfds:{text}: {field!r}{meant(field, FIELDS)}; #image=KEY,caption=KEY"
                " is wanted"
            )
    return dataset, asked


def choose(
    library: Any, features: Mapping[str, Any], supervised: Any, asked: Mapping[str, str]
) -> dict[str, str | None]:
    """Which feature is the `image` and which the `caption`, if there is one.

    What is `asked`; else for the image the first of `supervised` that is one, "image", or the only
    one. For the caption one of `CAPTIONS` that holds text; else a label: that of `supervised`,
    "label", or the only one. Raises ValueError, which lists the candidates, where that decides
    nothing.
    """
    for field, key in asked.items():
        if key not in features:
            raise ValueError(
                f"there is no {field} {key!r}{meant(key, features)}; it has {_list(features)}"
            )
    images = [key for key, feature in features.items() if isinstance(feature, library.Image)]
    if not images:
        raise ValueError(f"it has no image; it has {_list(features)}")
    photos = [key for key in images if not isinstance(features[key], library.LabeledImage)]
    leading = [key for key in _leaves(supervised) if key in photos][:1]
    image = asked.get("image") or _only("image", leading or photos or images, "image")
    if image not in images:
        raise ValueError(f"{image!r} is no image; images are {_list(images)}")
    if asked.get("caption") in images:
        raise ValueError(f"{asked['caption']!r} is an image, and no caption")
    if "caption" in asked:
        return {"image": image, "caption": asked["caption"]}
    words = [key for key in CAPTIONS if key in features and _holds_text(features[key].np_dtype)]
    labels = [key for key, feature in features.items() if isinstance(feature, library.ClassLabel)]
    targets = [key for key in _leaves(supervised) if key in features  # the library's has no get()
               and isinstance(features[key], library.ClassLabel | library.Text)]  # fmt: skip
    if not words and not labels and not targets:
        return {"image": image, "caption": None}
    return {"image": image, "caption": _only("caption", words[:1] or targets or labels, "label")}


def _only(field: str, candidates: Sequence[str], usual: str) -> str:
    """The one candidate, or the one of the usual name."""
    if len(candidates) > 1 and usual not in candidates:
        raise ValueError(
            f"which is the {field}: {_list(candidates)}? Say #{field}={sorted(candidates)[0]} or "
            "another behind the dataset's name"
        )
    return usual if usual in candidates else candidates[0]


def _list(keys) -> str:
    return ", ".join(sorted(keys))  # the library gives them in another order each time


def _leaves(keys: Any) -> Iterator[str]:
    """The names in `supervised_keys`, in order: a str, or tuples and dicts of them."""
    if isinstance(keys, str):
        yield keys
    elif isinstance(keys, Mapping):
        for value in keys.values():
            yield from _leaves(value)
    else:
        for value in keys or ():
            yield from _leaves(value)


def _holds_text(dtype: Any) -> bool:
    if isinstance(dtype, Mapping):
        return any(_holds_text(each) for key, each in dtype.items() if key in CAPTIONS)
    return dtype == np.dtype(object)
