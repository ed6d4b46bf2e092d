"""A segmenter for photos: the salient things of an image, by an ONNX network."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from composer_jax.conditions.maps import MAX_IDS, renumber


class OnnxSegmenter:
    """Salient things by an ONNX network of U2-Net's kind (arXiv 2005.09007), one id a piece.

    The network takes float32 [1, 3, S, S], normalised, and gives the likelihood of "salient" as its
    first output. What is above a half and connected is an instance, if it covers at least
    `least` of the image; ids by falling size.
    """

    def __init__(self, path, *, threshold: float = 0.5, least: float = 0.005, session=None):
        """`session`: an open onnxruntime session instead of `path`. Raises ValueError where
        onnxruntime is not installed, or `path` is missing or no such network."""
        self.threshold, self.least = threshold, least
        self._session = session if session is not None else _open(Path(path))
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (3, None, "channels"):
            raise ValueError(f"{path} takes {[i.shape for i in inputs]}; [1, 3, S, S] is wanted")
        self._input = inputs[0].name
        self._size = tuple(n if isinstance(n, int) and n > 0 else 320 for n in shape[2:])

    def __call__(self, images) -> np.ndarray:
        """uint8 [B, H, W, 3] to ids uint8 [B, H, W], 0 is the background."""
        return np.stack([self._pieces(self.likelihood(image)) for image in images])

    def likelihood(self, image: np.ndarray) -> np.ndarray:
        """float32 [H, W] in [0, 1]: how salient each pixel of uint8 [H, W, 3] is."""
        from PIL import Image

        small = Image.fromarray(image).resize(self._size[::-1], Image.Resampling.LANCZOS)
        pixels = np.asarray(small, np.float32) / max(float(np.max(small)), 1.0)
        pixels = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        inputs = {self._input: np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])}
        output = np.asarray(self._session.run(None, inputs)[0], np.float32)[0, 0]
        size = image.shape[1::-1]
        return np.asarray(Image.fromarray(output).resize(size, Image.Resampling.BILINEAR))

    def _pieces(self, likelihood: np.ndarray) -> np.ndarray:
        from scipy.ndimage import label

        pieces, _ = label(likelihood > self.threshold, structure=np.ones((3, 3)))
        counts = np.bincount(pieces.ravel())
        counts[0] = 0
        order = np.argsort(-counts, kind="stable")[: MAX_IDS - 1]
        order = order[counts[order] >= max(self.least * pieces.size, 1)]
        return renumber(pieces, np.sort(order), 1 + np.argsort(order)).astype(np.uint8)


def _open(path: Path):
    if not path.is_file():
        raise ValueError(f"segmenter {path} does not exist")
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "the segmenter needs onnxruntime: pip install 'composer-jax[segment]'"
        ) from error
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes
        raise ValueError(f"segmenter {path} is no ONNX network: {str(error)[:200]!r}") from error
