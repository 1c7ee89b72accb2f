"""A policy behind a websocket: `client.py`'s protocol under /policy, vla-evaluation-harness's under /, GET /health.

Requests that arrive while a prediction runs wait together and make up the next one. A message that cannot be used gets
one error in words and the connection lives on; size, number of clients, pictures per request, requests per second and
waiting times are bounded. A token, if there is one, is compared before the websocket opens.

Trap: on a GPU, and with prompts of unequal length, a picture's actions differ in the last digits with what else is in
its batch. `max_batch` 1, or `alone` in a request, predicts every picture by itself.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from vlm4vla_core.client import PATH, PROTOCOL, pack, unpack
from vlm4vla_core.errors import InputError

LONGEST_TEXT = 2000  # characters of an instruction
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """max_bytes: of one message. max_clients: connected at once. max_batch: pictures in one prediction.

    max_pictures: in one request. rate: requests per second of one client; a faster one is held back.
    idle_s: silence after which a client is let go. send_s: for taking an answer.
    stop_s: for what is under way when the server is told to stop."""

    max_bytes: int = 64 << 20
    max_clients: int = 64
    max_batch: int = 64
    max_pictures: int = 256
    rate: float = 1000.0
    idle_s: float = 1800.0
    send_s: float = 60.0
    stop_s: float = 30.0


def read_token(path: Path | None) -> str | None:
    """The token in a file, None without one. Raises InputError when it cannot be read or is empty."""
    if path is None:
        return None
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token cannot be read ({error})", where=path) from None
    if not token:
        raise InputError("the token file is empty", where=path)
    return token


@dataclass(eq=False)
class _Ask:
    """Pictures (B, H, W, 3) with instructions, and where their actions (B, chunk, A) go."""

    images: np.ndarray
    instructions: list[str]
    alone: bool
    answer: asyncio.Future[np.ndarray] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def joins(self, others: list[_Ask], most: int) -> bool:
        together = sum(len(ask.images) for ask in others) + len(self.images)
        return not (self.alone or others[0].alone) and (
            together <= most and self.images.shape[1:] == others[0].images.shape[1:]
        )


class PolicyServer:
    """Serves `policy` (anything with `predict(images, instructions).actions`, such as a `VLAPolicy`).

    told: what every client is told of it: model, fingerprint, labels, domains, convention, chunk, camera, image_size.
    execute: actions of a chunk that the harness's clients get before the policy looks again; all when None.
    """

    def __init__(
        self,
        policy: Any,
        told: dict[str, Any],
        *,
        token: str | None = None,
        limits: Limits | None = None,
        execute: int | None = None,
    ) -> None:
        self.policy, self.told, self.limits = policy, told, limits or Limits()
        self.execute = execute or told["chunk"]
        self._token, self._clients, self._busy, self._stopping = token, 0, 0, False
        self._asked: asyncio.Queue[_Ask] = asyncio.Queue()

    async def run(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serve until `stop` is set, then answer what is under way and leave. ready: called with the port.

        Raises InputError when the address cannot be used."""
        try:
            server = await serve(
                self._client, host, port, process_request=self._admit, compression=None, max_queue=2,
                max_size=self.limits.max_bytes, ping_interval=None, close_timeout=2, server_header=None, logger=_LOG,
            )  # fmt: skip
        except OSError as error:
            fix = "choose another --host or --port, or stop the program that holds it"
            raise InputError(f"cannot listen ({error.strerror or error})", where=f"{host}:{port}", fix=fix) from None
        predicting = asyncio.create_task(self._predict())
        try:
            ready(next(iter(server.sockets)).getsockname()[1])
            await stop.wait()
            self._stopping = True
            server.close(close_connections=False)
            deadline = asyncio.get_running_loop().time() + self.limits.stop_s
            while self._busy and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.01)
            leaving = [connection.close(1001, "the server stops") for connection in server.connections]
            await asyncio.gather(*leaving, return_exceptions=True)
            await asyncio.wait_for(server.wait_closed(), self.limits.stop_s)
        finally:
            predicting.cancel()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer /health; refuse who has not the token, before anything of the policy is told."""
        url = urlsplit(request.path)
        if url.path == "/health":
            return _json(connection, http.HTTPStatus.OK, {"status": "stopping" if self._stopping else "ok"})
        if self._token is not None:
            # The harness's client cannot send headers, so its address may carry ?token=…
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            given = given or parse_qs(url.query).get("token", [""])[0]
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                return _json(connection, http.HTTPStatus.UNAUTHORIZED, {"error": "wrong or missing token"})
        if url.path not in (PATH, "/"):
            fix = f"use {PATH}, / or /health"
            return _json(connection, http.HTTPStatus.NOT_FOUND, {"error": f"no such path; {fix}"})
        return None

    async def _client(self, connection: ServerConnection) -> None:
        if self._clients >= self.limits.max_clients or self._stopping:
            why = "the server stops" if self._stopping else f"the server has its {self.limits.max_clients} clients"
            await connection.close(1013, why)
            return
        self._clients += 1
        try:
            if connection.request is not None and urlsplit(connection.request.path).path == PATH:
                hello = {"type": "hello", "protocol": PROTOCOL, "policy": self.told, "limits": vars(self.limits)}
                await self._send(connection, pack(hello))
                await self._talk(connection, self._answer)
            else:
                from vlm4vla_core.harness import Session

                await self._talk(connection, Session(self).answer)
        except ConnectionClosed:
            pass
        except TimeoutError:
            await connection.close(1008, "silent or slow for too long")
        finally:
            self._clients -= 1

    async def _talk(self, connection: ServerConnection, answer: Callable[[Any], Any]) -> None:
        """Answer one message after the other, not more than `rate` a second (with a second's worth in reserve)."""
        loop, due = asyncio.get_running_loop(), 0.0
        while True:
            message = await asyncio.wait_for(connection.recv(), self.limits.idle_s)
            due = max(due, loop.time() - 1) + 1 / self.limits.rate
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if self._stopping:
                return
            self._busy += 1
            try:
                if (reply := await answer(message)) is not None:
                    await self._send(connection, reply)
            finally:
                self._busy -= 1

    async def _send(self, connection: ServerConnection, data: bytes) -> None:
        await asyncio.wait_for(connection.send(data), self.limits.send_s)

    async def _answer(self, data: str | bytes) -> bytes:
        number = None
        try:
            message = unpack(data)
            number = message.get("id")
            if type(number) is not int or not 0 <= number < 1 << 63:
                number = None
                raise ValueError("'id' has to be a whole number, 0 or more")
            if message["type"] != "predict":
                raise ValueError(f"unknown message type '{message['type'][:40]}'; known: predict")
            actions = await self.ask(message.get("images"), message.get("instructions"), message.get("alone") is True)
            return pack({"type": "actions", "id": number, "actions": actions})
        except ValueError as error:
            return pack({"type": "error", "id": number, "error": str(error)})

    async def ask(self, images: Any, instructions: Any, alone: bool = False) -> np.ndarray:
        """Actions (B, chunk, A) for one request. Raises ValueError, in words for the client, when there are none."""
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"'images' has to be uint8 (B, H, W, 3), got {got}")
        if not 1 <= len(images) <= self.limits.max_pictures or 0 in images.shape:
            raise ValueError(f"{images.shape} pictures; 1 to {self.limits.max_pictures}, not empty, are answered")
        if not isinstance(instructions, list) or not all(isinstance(text, str) for text in instructions):
            raise ValueError("'instructions' has to be a list of texts")
        if len(instructions) != len(images):
            raise ValueError(f"{len(images)} pictures and {len(instructions)} instructions do not pair up")
        if any(not text.strip() or len(text) > LONGEST_TEXT for text in instructions):
            raise ValueError(f"an instruction is empty or longer than {LONGEST_TEXT} characters")
        ask = _Ask(images, instructions, alone or self.limits.max_batch == 1)
        self._asked.put_nowait(ask)
        return await ask.answer

    async def _predict(self) -> None:
        """Take the first that waits and all that fit with it; one thread does nothing but predict."""
        loop, waiting = asyncio.get_running_loop(), list[_Ask]()
        with ThreadPoolExecutor(1, "predict") as thread:
            while True:
                waiting = waiting or [await self._asked.get()]
                while not self._asked.empty():
                    waiting.append(self._asked.get_nowait())
                batch, waiting = waiting[:1], waiting[1:]
                for ask in waiting:
                    if ask.joins(batch, self.limits.max_batch):
                        batch.append(ask)
                waiting = [ask for ask in waiting if ask not in batch]
                answers = await loop.run_in_executor(thread, self._actions, batch)
                for ask, answer in zip(batch, answers, strict=True):
                    if ask.answer.cancelled():  # its client has gone
                        continue
                    if isinstance(answer, ValueError):
                        ask.answer.set_exception(answer)
                    else:
                        ask.answer.set_result(answer)

    def _actions(self, batch: list[_Ask]) -> list[np.ndarray | ValueError]:
        """Actions of each request, or why there are none. One that the policy refuses does not take others with it."""
        images = np.concatenate([ask.images for ask in batch])
        texts = [text for ask in batch for text in ask.instructions]
        most = 1 if batch[0].alone else self.limits.max_batch
        try:
            parts = [
                np.asarray(self.policy.predict(images[i : i + most], texts[i : i + most]).actions, np.float32)
                for i in range(0, len(images), most)
            ]
            ends = np.cumsum([len(ask.images) for ask in batch])[:-1]
            return list(np.split(np.concatenate(parts), ends))
        except Exception as error:  # whatever it is, the server lives on
            if len(batch) > 1:
                return [self._actions([ask])[0] for ask in batch]
            if isinstance(error, InputError):
                return [ValueError(str(error))]
            _LOG.exception("prediction failed")
            return [ValueError(f"the policy failed ({type(error).__name__})")]


def _json(connection: ServerConnection, status: http.HTTPStatus, value: dict[str, str]) -> Response:
    response = connection.respond(status, json.dumps(value) + "\n")
    response.headers["Content-Type"] = "application/json"
    return response
