"""One frame as the store keeps it: JPEG or raw bytes for colours, and losslessly packed depth and segmentation.

Lossless frames are the differences between horizontal neighbours, compressed with Zstandard level 1: a real CALVIN
depth image (80 kB, millimetres) takes 15.7 kB, 0.18 ms in and 0.17 ms out; PNG 16.7 kB, 1.7 and 0.4 ms; LZ4 38.5 kB
at 0.08 and 0.02 ms (benchmarks/episodes.py).
Trap: a packed frame does not say its own size; the manifest does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from vlm4vla_core import images

LAYERS: dict[str, type] = {"depth": np.uint16, "segmentation": np.uint8}


def encode(
    frame: bytes | np.ndarray, size: int | None, *, raw: bool, quality: int, full_colour: bool
) -> tuple[bytes, tuple[int, int]]:
    """A frame at the training size and its (height, width); a JPEG that already has it is copied unchanged.

    frame: an encoded image, or uint8 (H, W, 3). size: square side in pixels, None keeps the frame's own. raw: plain
    bytes instead of JPEG. Raises ValueError when the frame is no image.
    """
    import simplejpeg

    if isinstance(frame, bytes):
        if frame[:2] == images.JPEG_MAGIC and not raw:
            height, width, *_ = simplejpeg.decode_jpeg_header(frame)
            if size is None or (height, width) == (size, size):
                return frame, (height, width)
        frame = images.decode(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    picture = images.resize(frame[None], size)[0] if size else frame
    data = picture.tobytes() if raw else images.encode(picture, quality=quality, full_colour=full_colour)
    return data, picture.shape[:2]


def pack(frame: np.ndarray) -> bytes:
    """An unsigned integer image (H, W) as bytes, without loss."""
    differences = np.diff(frame, axis=1, prepend=frame.dtype.type(0))  # wraps around, and back again in `unpack`
    return _codec().compress(np.ascontiguousarray(differences), asbytes=True)


def unpack(data: bytes | memoryview, dtype: type, shape: tuple[int, int]) -> np.ndarray:
    """The way back of `pack`: (H, W) of `dtype`. Raises ValueError on damaged bytes."""
    expected = shape[0] * shape[1] * np.dtype(dtype).itemsize
    try:
        plain = _codec().decompress(data, decompressed_size=expected, asbytes=True)
    except OSError as error:
        raise ValueError(str(error)) from None
    return np.cumsum(np.frombuffer(plain, dtype).reshape(shape), axis=1, dtype=dtype)


@cache
def _codec() -> Any:
    import pyarrow as pa

    return pa.Codec("zstd", compression_level=1)
