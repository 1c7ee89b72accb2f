"""The protocol of vla-evaluation-harness's model servers (`vla-eval` 0.8), so that its containers can ask our policies.

Messages are msgpack maps of type, payload, seq and timestamp; arrays are maps that carry `__ndarray__`, pictures maps
that carry `__image__` (PNG, JPEG or raw bytes). One observation is answered by one action; the chunk is kept here.

Trap: the harness compares action formats but only warns. Its CALVIN takes metres and radians where a policy trained on
CALVIN's own relative actions gives shares of 0.02 m and 0.05 rad; that one is converted here, by the benchmark's name.
"""

from __future__ import annotations

import asyncio
import io
import time
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from vlm4vla_core import images
from vlm4vla_core.actions import CALVIN

if TYPE_CHECKING:
    from vlm4vla_core.serve import PolicyServer

PROTOCOL = 1
MOST_PIXELS = 1 << 24
_CALVIN_UNITS = np.array([0.02] * 3 + [0.05] * 3 + [1.0], np.float32)
_GRIPPERS = {
    (1.0, -1.0): ("binary_close_negative", [-1, 1]),
    (-1.0, 1.0): ("binary_close_positive", [-1, 1]),
    (1.0, 0.0): ("continuous_01", [0, 1]),
    (0.0, 1.0): ("binary_close_01", [0, 1]),
}


def action_spec(convention: dict[str, Any]) -> dict[str, Any]:
    """An action convention (`ActionConvention.to_dict`) in the harness's words: position, rotation, gripper."""
    grip, span = _GRIPPERS.get((convention["gripper_open"], convention["gripper_closed"]), ("raw", None))
    kind = "absolute_xyz" if convention["relative"] is False else "delta_xyz"
    spec: dict[str, Any] = {
        "position": {"name": "position", "dims": 3, "format": kind, "description": convention["scaling"]},
        "rotation": {"name": "rotation", "dims": len(convention["names"]) - 4, "format": convention["rotation"]},
        "gripper": {"name": "gripper", "dims": 1, "format": grip},
    }
    if span:
        spec["gripper"]["range"] = span
    return spec


class Session:
    """One client of the harness: its episode's words, and what is left of the last chunk."""

    def __init__(self, server: PolicyServer) -> None:
        self._server, self._units = server, np.ones(1, np.float32)
        self._left: list[np.ndarray] = []
        self._words: Any = None

    async def answer(self, data: str | bytes) -> bytes | None:
        """The reply to one message, None where the protocol has none."""
        seq = 0
        try:
            message = _unpack(data)
            kind, payload, seq = message["type"], message["payload"], message["seq"]
            if kind == "hello":
                return _pack("hello", self._hello(payload), seq)
            if kind == "observation":
                return _pack("action", {"actions": _array(await self._act(payload))}, seq)
            if kind in ("episode_start", "episode_end"):
                self._left = []
            elif kind != "error":
                raise ValueError(f"unknown message type '{kind[:40]}'")
            return None
        except ValueError as error:
            return _pack("error", {"error": str(error)}, seq)

    def _hello(self, payload: dict[str, Any]) -> dict[str, Any]:
        told = self._server.told
        if "calvin" in str(payload.get("benchmark", "")).lower() and told["convention"] == CALVIN.to_dict():
            self._units = _CALVIN_UNITS
        return {
            "harness_version": "0.8 (answered by vlm4vla)",
            "protocol_version": PROTOCOL,
            "model_server": f"vlm4vla {told['model']}",
            "capabilities": {},
            "action_spec": action_spec(told["convention"]),
            "observation_spec": {"language": {"name": "language", "dims": 0, "format": "language"}},
        }

    async def _act(self, observation: dict[str, Any]) -> np.ndarray:
        """The next action (A,) float32; a new chunk when the last is used up or the words have changed."""
        pictures, words = observation.get("images"), observation.get("task_description")
        if not self._left or words != self._words:
            camera = self._server.told["camera"]
            if not isinstance(pictures, dict) or not (camera in pictures or len(pictures) == 1):
                names = sorted(map(str, pictures)) if isinstance(pictures, dict) else "none"
                raise ValueError(f"'images' has to hold one picture, or one named '{camera}'; got {names}")
            picture = pictures[camera] if camera in pictures else next(iter(pictures.values()))
            picture = await asyncio.to_thread(_picture, picture)
            chunk = (await self._server.ask(picture[None], [words]))[0][: self._server.execute]  # (execute, A)
            self._left, self._words = list(chunk * self._units), words
        return self._left.pop(0)


def _pack(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


def _unpack(data: str | bytes) -> dict[str, Any]:
    """A message, its pictures still packed; raises ValueError when it is none."""
    if isinstance(data, str):
        raise ValueError("a text message; send msgpack as binary")
    try:
        message = msgpack.unpackb(data)
    except ValueError as error:
        raise ValueError(f"not a msgpack message ({error or type(error).__name__})") from None
    kinds = {"type": str, "payload": dict, "seq": int}
    if not isinstance(message, dict) or not all(isinstance(message.get(key), kind) for key, kind in kinds.items()):
        raise ValueError("a message is a map of type (text), payload (map), seq (whole number) and timestamp")
    return message


def _array(values: np.ndarray) -> dict[str, Any]:
    return {"__ndarray__": True, "data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}


def _picture(value: Any) -> np.ndarray:
    """The picture (H, W, C) that a map stands for. Raises ValueError when it is none, damaged or too large."""
    if not isinstance(value, dict) or not {"__image__", "__ndarray__"} & set(value):
        raise ValueError("a picture has to be uint8 (H, W, 3)")
    data = value.get("data")
    if not isinstance(data, bytes):
        raise ValueError("a picture without data")
    if value.get("format") in ("png", "jpeg"):
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as header:  # reads the size, no pixel yet
                size = header.size[0] * header.size[1]
        except Exception:  # Pillow raises many kinds
            raise ValueError("a picture that is neither PNG nor JPEG") from None
        if size > MOST_PIXELS:
            raise ValueError(f"a picture of {size} pixels; at most {MOST_PIXELS} are read")
        return images.decode(data)
    try:
        picture = np.frombuffer(data, np.uint8).reshape(value["shape"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a damaged picture ({error})") from None
    if value.get("dtype") != "|u1" or picture.ndim != 3:
        raise ValueError("a picture has to be uint8 (H, W, 3)")
    return picture
