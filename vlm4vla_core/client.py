"""Ask a policy server for actions: one file, to be copied beside a simulator's own code (Python 3.8 or newer).

It needs numpy (1 or 2), msgpack and websockets (13 or newer) and nothing of this package. The wire format stands here
too, for both ends: msgpack maps, arrays as extension type 1 holding [dtype, shape, bytes]; nothing is ever unpickled.

    policy = RemotePolicy("127.0.0.1:8765", token=None)
    actions = policy.predict(images, ["open the drawer"])  # uint8 (1, H, W, 3) -> float32 (1, chunk, A)

Trap: actions are in the policy's own convention (`policy.convention`): units, rotation, frame and gripper sign may not
be the simulator's, and the first actions of the chunk are to be carried out in order before asking again.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import connect

PROTOCOL = 1
PATH = "/policy"
ARRAY = 1  # msgpack extension type
DTYPES = ("|b1", "|u1", "<i4", "<i8", "<f4", "<f8")


class RemoteError(Exception):
    """The server refused, failed, or cannot be reached; one line."""


def pack(message: dict[str, Any]) -> bytes:
    """A message with arrays as bytes. Raises TypeError on anything that msgpack has no word for."""
    return msgpack.packb(message, default=_from_array)


def _from_array(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"cannot send a {type(value).__name__}")
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return msgpack.ExtType(ARRAY, msgpack.packb([little.dtype.str, value.shape, little.data]))


def unpack(data: str | bytes) -> dict[str, Any]:
    """A message back; its arrays are read-only views. Raises ValueError, whatever the bytes are, when it is none."""
    if isinstance(data, str):
        raise ValueError("a text message; send msgpack as binary")
    try:
        message = msgpack.unpackb(data, ext_hook=_to_array)
    except ValueError as error:  # includes msgpack's own errors and broken UTF-8
        raise ValueError(f"not a msgpack message ({str(error) or type(error).__name__})") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError("a message is a map with a text under 'type'")
    return message


def _to_array(code: int, data: bytes) -> np.ndarray:
    parts = msgpack.unpackb(data) if code == ARRAY else None
    if not isinstance(parts, list) or len(parts) != 3 or parts[0] not in DTYPES or not isinstance(parts[2], bytes):
        raise ValueError(f"no array of type {', '.join(DTYPES)}")
    dtype, shape = np.dtype(parts[0]), parts[1]
    whole = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
    count = 1
    for n in shape if whole else ():
        count *= n
    if not whole or count * dtype.itemsize != len(parts[2]):
        raise ValueError(f"an array's shape does not fit its {len(parts[2])} bytes")
    return np.frombuffer(parts[2], dtype).reshape(shape)


class RemotePolicy:
    """A policy behind `vlm4vla serve`. Not for several threads at once: open one for each.

    url: HOST:PORT or ws://HOST:PORT. timeout: seconds to wait for a connection or an answer.
    policy: what the server says of itself, with `convention`, `chunk`, `camera` also as attributes.
    Raises RemoteError when the server cannot be reached, refuses the token, or speaks another version.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 60.0) -> None:
        base = url if "://" in url else "ws://" + url
        self.url, self.timeout, self._asked = base.rstrip("/"), timeout, 0
        headers = {"Authorization": "Bearer " + token} if token else {}
        # A server on one's own network is not behind a web proxy; websockets before 15 knows none.
        more = {"proxy": None} if "proxy" in inspect.signature(connect).parameters else {}
        try:
            self._socket = connect(
                self.url + PATH, additional_headers=headers, compression=None, max_size=None, open_timeout=timeout,
                **more,
            )  # fmt: skip
        except InvalidStatus as error:
            status = error.response.status_code
            reason = "refuses the token" if status == 401 else f"answered with HTTP status {status}"
            raise RemoteError(f"the policy server {reason} [{self.url}]") from None
        except (OSError, ValueError, WebSocketException) as error:
            raise RemoteError(f"no policy server answers at {self.url} ({error})") from None
        try:
            hello = self._receive()
            if hello["type"] != "hello" or hello.get("protocol") != PROTOCOL:
                theirs = hello.get("protocol")
                raise RemoteError(f"the server speaks protocol {theirs}, this client {PROTOCOL}; use equal versions")
        except RemoteError:
            self.close()
            raise
        self.policy = hello["policy"]
        self.convention = self.policy["convention"]
        self.chunk = self.policy["chunk"]
        self.camera = self.policy["camera"]

    def predict(self, images: np.ndarray, instructions: list[str], alone: bool = False) -> np.ndarray:
        """Actions float32 (B, chunk, A) for pictures uint8 (B, H, W, 3) and B instructions, in `convention`.

        alone: every picture is predicted by itself, so that rounding does not depend on others in the batch.
        Raises RemoteError with the server's words, or when it does not answer in time.
        """
        self._asked += 1
        asked = {"type": "predict", "id": self._asked, "images": images, "instructions": list(instructions)}
        try:
            self._socket.send(pack(dict(asked, alone=bool(alone))))
        except ConnectionClosed as error:
            raise RemoteError(_why(error)) from None
        answer = self._receive()
        if answer["type"] != "actions" or answer.get("id") != self._asked:
            raise RemoteError(str(answer.get("error", "an answer of type " + answer["type"])))
        return answer["actions"]

    def _receive(self) -> dict[str, Any]:
        try:
            return unpack(self._socket.recv(self.timeout))
        except TimeoutError:
            self.close()  # a late answer must not be taken for the next one's
            raise RemoteError(f"no answer within {self.timeout:g} s [{self.url}]") from None
        except ConnectionClosed as error:
            raise RemoteError(_why(error)) from None
        except ValueError as error:
            self.close()
            raise RemoteError(f"the server's answer cannot be read ({error})") from None

    def close(self) -> None:
        """Leave; a second time does nothing."""
        self._socket.close()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _why(error: ConnectionClosed) -> str:
    said = error.rcvd.reason if error.rcvd else ""
    return "the server closed the connection" + (": " + said if said else "")
