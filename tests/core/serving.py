"""A policy server in a thread of the test, and a policy whose answers can be worked out by hand."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.errors import InputError
from vlm4vla_core.serve import Limits, PolicyServer

CHUNK = 4
TOLD: dict[str, Any] = {
    "model": "by hand", "fingerprint": "f" * 16, "labels": {"run_id": "f" * 16, "model": "by hand"}, "domains": [],
    "convention": TABLETOP.to_dict(), "chunk": CHUNK, "camera": "front", "image_size": 8,
}  # fmt: skip


@dataclass
class ByHand:
    """Action k of a chunk is (mean of the picture, letters of the instruction, k, 0, 0, 0, 1)."""

    wait: float = 0.0
    batches: list[int] = field(default_factory=list)

    def predict(self, images: np.ndarray, instructions: Sequence[str]) -> SimpleNamespace:
        self.batches.append(len(images))
        time.sleep(self.wait)
        if "refuse" in instructions:
            raise InputError("this instruction is refused")
        if "break" in instructions:
            raise RuntimeError("/secret/path broke")
        return SimpleNamespace(actions=by_hand(images, instructions))


def by_hand(images: np.ndarray, instructions: Sequence[str]) -> np.ndarray:
    actions = np.zeros((len(images), CHUNK, 7), np.float32)
    actions[..., 0] = images.reshape(len(images), -1).mean(1)[:, None]
    actions[..., 1] = np.array([len(text) for text in instructions])[:, None]
    actions[..., 2], actions[..., 6] = np.arange(CHUNK), 1
    return actions


@dataclass
class Running:
    """Where a server listens; `stop` tells it to leave and returns when it has (at most 20 s)."""

    port: int
    server: PolicyServer
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    event: asyncio.Event

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def tell(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.event.set)

    def stop(self) -> None:
        self.tell()
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server does not stop"


@contextmanager
def serving(policy: Any, told: dict[str, Any] = TOLD, **options: Any) -> Iterator[Running]:
    """Serve on a loopback port of the system's choice. Options: token, execute, and fields of `Limits`."""
    given = {name: options.pop(name) for name in ("token", "execute") if name in options}
    server = PolicyServer(policy, told, limits=Limits(**{"stop_s": 5.0, **options}), **given)
    began: queue.Queue[Any] = queue.Queue()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        await server.run("127.0.0.1", 0, stop, lambda port: began.put((port, loop, stop)))

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    port, loop, stop = began.get(timeout=20)
    running = Running(port, server, thread, loop, stop)
    try:
        yield running
    finally:
        running.stop()
