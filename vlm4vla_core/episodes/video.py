"""Frames of a video at given times, decoded one after another with constant memory (PyAV, so FFmpeg's decoders).

Traps: a file may hold many episodes, so a frame is found by its presentation time and never by its number; decoded
yuv frames are exact for any conforming decoder, their RGB conversion is not (FFmpeg's is used here).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import av

_AGAIN = "fetch the file again, or leave the camera out"


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of a video at `times`: (T,) seconds from its beginning, increasing, met to `tolerance` seconds.

    Has a length and can be iterated, any number of times: every frame is RGB uint8 (H, W, 3). Iterating raises
    InputError naming the file and the time when a frame is missing or cannot be decoded.
    """

    path: Path
    times: np.ndarray
    tolerance: float

    def __len__(self) -> int:
        return len(self.times)

    def __iter__(self) -> Iterator[np.ndarray]:
        wanted = iter(self.times)
        time = next(wanted, None)
        if time is None:
            return
        for at, frame in _decoded(self.path, float(time) - self.tolerance):
            if at > time + self.tolerance:
                break
            if at < time - self.tolerance:
                continue
            yield frame.to_ndarray(format="rgb24")
            time = next(wanted, None)
            if time is None:
                return
        what = f"the video has no frame within {1000 * self.tolerance:.1f} ms of {time:.3f} s"
        raise InputError(what, where=self.path, fix=_AGAIN)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack(list(self)).astype(dtype or np.uint8, copy=False)


def _decoded(path: Path, start: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
    """Seconds from the video's beginning and frame, from the last keyframe at or before `start` on.

    Raises InputError when the file is missing, no video, or damaged.
    """
    import av

    if not path.is_file():
        raise InputError("video file missing", where=path, fix="fetch it, or leave the camera out")
    at = 0.0
    try:
        with av.open(str(path)) as container:
            stream = next((one for one in container.streams.video if one.codec_context), None)
            if stream is None:
                raise InputError("the file holds no video that can be decoded", where=path, fix=_AGAIN)
            stream.codec_context.thread_count = 1  # conversion is parallel over episodes
            if stream.time_base is None:
                raise InputError("the video tells no times", where=path, fix=_AGAIN)
            unit, first = float(stream.time_base), stream.start_time or 0
            if start > 0:
                container.seek(int(start / unit) + first, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None or frame.is_corrupt:
                    raise InputError(f"a damaged frame after {at:.3f} s of video", where=path, fix=_AGAIN)
                at = (frame.pts - first) * unit
                yield at, frame
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise InputError(f"cannot be decoded after {at:.3f} s ({reason})", where=path, fix=_AGAIN) from None


def video_fingerprint(path: Path) -> dict[str, Any]:
    """codec, width, height, number of frames and keyframes, and the SHA-256 of all decoded yuv420p frames in order."""
    digest, frames, keyframes, about = hashlib.sha256(), 0, 0, {}
    for _, frame in _decoded(Path(path)):
        digest.update(frame.to_ndarray(format="yuv420p").tobytes())
        frames, keyframes = frames + 1, keyframes + bool(frame.key_frame)
        about = {"width": frame.width, "height": frame.height}
    return {**about, "frames": frames, "keyframes": keyframes, "yuv420p_sha256": digest.hexdigest()}
