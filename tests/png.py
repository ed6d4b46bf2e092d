"""PNG files as their standard has them, of any depth and with any chunk."""

import struct
import zlib

import numpy as np


def png(image: np.ndarray, depth: int = 8, **chunks: bytes) -> bytes:
    """A PNG file of an image [H, W, C] with further chunks."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, channels = image.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in image)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *((k.encode(), v) for k, v in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
