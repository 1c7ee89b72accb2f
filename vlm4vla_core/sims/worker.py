"""A process that steps one simulator for `sims.pool`: `python -m vlm4vla_core.sims.worker FD`.

It is told a protocol, then one episode after the other. A baseline plays a whole episode by itself; a learned policy is
asked over the pipe for a chunk of actions, and only then is a picture drawn.

Trap: simulators print; what they say goes to a log, and only the last lines are shown when the process fails.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core.actors import BaselineActor, Driver
from vlm4vla_core.errors import InputError
from vlm4vla_core.playback import Playback
from vlm4vla_core.sims.simulator import Observation, Simulator

_BEAT = 1.0  # seconds between signs of life


@dataclass(frozen=True)
class Order:
    """One episode. seed: of a baseline's own random numbers. film: where its film goes, None for none."""

    task: str
    episode: int
    seed: int
    film: Path | None = None


class _Pipe:
    """The worker's end: signs of life while it steps, questions to the policy."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self._last = connection, time.monotonic()

    def alive(self) -> None:
        if time.monotonic() - self._last > _BEAT:
            self.connection.send(("alive",))
            self._last = time.monotonic()

    def ask(self, picture: np.ndarray, words: str) -> np.ndarray:
        self.connection.send(("look", picture, words))
        return self.connection.recv()


def play(
    sim: Simulator,
    order: Order,
    driver: Driver,
    ask: Callable[[np.ndarray, str], np.ndarray],
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run one episode; returns its outcome. ask: (picture, instruction) -> chunk (C, A), for policies that look."""
    seen, _ = sim.reset(order.task, order.episode)
    rng = np.random.default_rng([order.seed, 1])  # a baseline's own stream, apart from the world's
    playback, frames, first = Playback(driver.convention, driver.execute, driver.ensemble), [], True
    while sim.running:
        if playback.wants(first or sim.renewed):
            if isinstance(driver.baseline, BaselineActor):
                playback.add(driver.baseline.one(sim.expert, rng)[None])
            else:
                playback.add(ask(seen.render(driver.camera), sim.instruction))
        first, action = False, playback.next()
        if order.film:
            frames.append(_frame(seen, driver, sim.instruction, action))
        seen = sim.step(action)
        beat()
    outcome = sim.outcome()
    if order.film:
        _film(order.film, frames, seen, driver, sim.instruction, outcome)
    return outcome


def _frame(seen: Observation, driver: Driver, words: str, action: np.ndarray, outcome: str = "") -> np.ndarray:
    from vlm4vla_core.film import captioned, numbers

    return captioned(seen.render(driver.camera), words, outcome=outcome or numbers(action))


def _film(
    path: Path, frames: list[np.ndarray], seen: Observation, driver: Driver, words: str, outcome: dict[str, Any]
) -> None:
    from vlm4vla_core.film import told, write_video

    rate = driver.convention.control_hz
    last = _frame(seen, driver, words, np.zeros(0), told(outcome))
    write_video(path, [*frames, *[last] * round(rate)], fps=float(rate))


def main(descriptor: int) -> None:
    """Serve the pool at the other end of a socket until it says None or goes away."""
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    pipe = _Pipe(Connection(descriptor))
    benchmark, options, driver = pipe.connection.recv()
    try:
        sim = benchmark.make(options)
        pipe.connection.send(("ready",))
        while (order := pipe.connection.recv()) is not None:
            began = time.perf_counter()
            outcome = play(sim, order, driver, pipe.ask, pipe.alive)
            pipe.connection.send(("done", outcome, time.perf_counter() - began))
        sim.close()
    except InputError as error:
        pipe.connection.send(("refused", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the pool is gone
        pass


def _leave_with_parent(parent: int) -> None:
    """Whatever the simulator hangs in, the process does not outlive the one that started it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # renderers' own farewells are noise, and some hang
