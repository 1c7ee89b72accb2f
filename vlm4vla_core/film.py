"""Films for people: frames under a line of text, written as MP4 (H.264) or GIF.

Trap: H.264 in the form that every player shows halves the colour's resolution and wants even sizes; a film is for
looking at, never for measuring.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core.errors import InputError

_LINE = 22  # pixels of the text line


def captioned(frame: np.ndarray, text: str, *, outcome: str = "", scale_to: int = 224) -> np.ndarray:
    """A frame uint8 (H, W, 3), enlarged by a whole factor to at least `scale_to` pixels of height, under its text;
    `outcome` is written over its lower edge."""
    from PIL import Image, ImageDraw, ImageFont

    factor = max(1, -(-scale_to // frame.shape[0]))
    picture = Image.fromarray(frame).resize(
        (frame.shape[1] * factor, frame.shape[0] * factor), Image.Resampling.NEAREST
    )
    sheet = Image.new("RGB", (picture.width, picture.height + _LINE), "white")
    sheet.paste(picture, (0, _LINE))
    draw, size, room = ImageDraw.Draw(sheet), 15, sheet.width - 8
    while size > 8 and draw.textlength(text, font=ImageFont.load_default(size)) > room:
        size -= 1
    if size < 11:  # a long task: two small lines
        cuts = (textwrap.wrap(text, width) for width in range(len(text) // 2, len(text) + 1))
        lines, size = next(cut for cut in cuts if len(cut) <= 2), 9
        while size > 7 and max(draw.textlength(line, font=ImageFont.load_default(size)) for line in lines) > room:
            size -= 1
        draw.multiline_text((4, 0), "\n".join(lines), fill="black", font=ImageFont.load_default(size), spacing=0)
    else:
        draw.text((4, 2), text, fill="black", font=ImageFont.load_default(size))
    if outcome:
        size = 15
        while size > 6 and draw.textlength(outcome, font=ImageFont.load_default(size)) > sheet.width - 12:
            size -= 1
        font = ImageFont.load_default(size)
        draw.rectangle((0, sheet.height - _LINE, draw.textlength(outcome, font=font) + 12, sheet.height), fill="black")
        draw.text((6, sheet.height - _LINE + 2), outcome, fill="white", font=font)
    return np.asarray(sheet)


def numbers(action: np.ndarray) -> str:
    """An action (A,) in words."""
    return " ".join(f"{value:+.2f}" if abs(value) >= 0.1 else f"{value:+.3f}" for value in action)


def told(outcome: Mapping[str, Any]) -> str:
    """An episode's outcome in words."""
    if outcome["chain"] is not None:
        return f"{outcome['chain']} of 5 done in {outcome['steps']} steps"
    return f"{'reached' if outcome['success'] else 'not reached'} in {outcome['steps']} steps"


def check_ending(path: Path) -> None:
    """Raise InputError unless the name is that of a film."""
    if path.suffix not in (".mp4", ".gif"):
        raise InputError(f"a film ends in .mp4 or .gif, not '{path.suffix}'", where=path)


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Write frames, all uint8 (H, W, 3) of one size, as .mp4 or .gif; the file appears whole or not at all.

    Raises InputError on another ending and on no frames.
    """
    check_ending(path)
    if not len(frames):
        raise InputError("no frames for a film", where=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        (_mp4 if path.suffix == ".mp4" else _gif)(draft, frames, fps)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _gif(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    from PIL import Image

    # An octree keeps the few pixels of a small thing in their colour, where the median cut blends them with the rest.
    octree, plain = Image.Quantize.FASTOCTREE, Image.Dither.NONE
    pages = [Image.fromarray(frame).quantize(256, method=octree, dither=plain) for frame in frames]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=round(1000 / fps), loop=0)


def _mp4(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    from fractions import Fraction

    import av

    height, width = (2 * (length // 2) for length in frames[0].shape[:2])
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            film.mux(stream.encode(picture))
        film.mux(stream.encode())
