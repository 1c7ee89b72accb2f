"""Worker processes that step simulators, and one process that predicts for all of them together.

A worker gets the next episode as soon as it has finished one. Whatever workers wait for an answer while a prediction
is made are answered by the next one in a single batch. A worker that crashes, says nothing for too long or fails to
draw is replaced, and only its episode is begun again.

Trap: what a batch holds depends on timing, so the last bits of a learned policy's actions do too; `batch_size=1` of the
actor (`evaluate --deterministic`) makes rows reproducible, a baseline's always are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.actors import Actor, Driver, PolicyActor, check_finite
from vlm4vla_core.errors import InputError
from vlm4vla_core.progress import progress
from vlm4vla_core.results import episode_row
from vlm4vla_core.sims.worker import Order

TIMEOUT = 300.0  # seconds without a sign of life; the first reset of a simulator compiles and loads
ATTEMPTS = 3  # of one episode, and of starting a worker


class _Failed(Exception):
    """A worker is of no more use; the reason in one line."""


class _Worker:
    """One process with its simulator. order: what it is doing. waits: for an answer of the policy."""

    def __init__(self, job: tuple[Any, Mapping[str, Any], Driver], log: Path) -> None:
        self.order: Order | None = None
        self.waits, self.ready, self.heard, self._log = False, False, time.monotonic(), log
        self.connection, theirs = Pipe()
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [interpreter(job[0]), "-m", "vlm4vla_core.sims.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True,  # Ctrl-C is this process's business
            )  # fmt: skip
        theirs.close()
        self.send(job)

    def send(self, message: Any) -> None:
        self.waits, self.heard = False, time.monotonic()
        try:
            self.connection.send(message)
        except OSError:
            raise _Failed(self._why()) from None

    def hear(self) -> tuple[Any, ...]:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise _Failed(self._why()) from None
        self.heard = time.monotonic()
        if message[0] == "refused":
            raise InputError(message[1])
        return message

    def _why(self) -> str:
        """The exit code and the last line that the process wrote."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        end = "it went silent" if code is None else f"exit code {code}"
        return end + (f", {lines[-1].strip()[:200]}" if lines else "")

    def stop(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def interpreter(benchmark: Any) -> str:
    """The Python that has what the benchmark needs: this one, or that of the simulator's own environment."""
    from vlm4vla_core.sims.simulator import where

    environment = getattr(benchmark, "environment", "")
    if environment and any(where(module, environment) != "here" for module in benchmark.modules):
        return str(folders.project_root() / f".venv-{environment}" / "bin" / "python")
    return sys.executable


def rollout(
    benchmark: Any,
    actor: Actor,
    cells: Sequence[tuple[str, int]],
    *,
    workers: int,
    options: Mapping[str, Any] | None = None,
    ensemble: str = "none",
    films: Mapping[tuple[str, int], Path] | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[dict[str, Any]]:
    """Run the episodes `cells` = [(task, episode), …] and yield a row for each as it ends, in no particular order.

    benchmark: a `SimulatorBenchmark`, or anything else with `make`. films: where the films of some cells go.
    Raises InputError when a worker refuses (unknown tasks, missing assets), and when an episode or the start of a
    worker fails three times; what was yielded before stays valid.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vlm4vla-pool-") as logs,
        progress(total=len(cells), what=f"evaluate {actor.labels['model']}", unit="episode") as bar,
    ):
        driver = actor.driver(benchmark, ensemble)
        pool = _Pool((benchmark, dict(options or {}), driver), actor, Path(logs), timeout)
        seeds = {cell: benchmark.env_seed(*cell) for cell in cells}
        films = films or {}
        pool.queue.extend(Order(*cell, seed=seeds[cell], film=films.get(cell)) for cell in cells)
        try:
            for order, outcome, seconds in pool.run(min(workers, len(cells))):
                bar.update()
                cell = (order.task, order.episode)
                yield episode_row(
                    benchmark, actor.labels, actor.execute, cell, env_seed=seeds[cell], wall_s=seconds, outcome=outcome
                )
        finally:
            pool.stop()


class _Pool:
    def __init__(self, job: Any, actor: Actor, logs: Path, timeout: float) -> None:
        self._job, self._actor, self._logs, self._timeout = job, actor, logs, timeout
        self.queue: deque[Order] = deque()
        self._workers: dict[Connection, _Worker] = {}
        self._looks: list[tuple[_Worker, Any, str]] = []
        self._failures: Counter[Any] = Counter()
        self._started, self._asked, self._patience = 0, 0.0, 0.0

    def run(self, workers: int) -> Iterator[tuple[Order, dict[str, Any], float]]:
        for _ in range(workers):
            self._start()
        while self._workers:
            asleep = min((worker.heard for worker in self._workers.values()), default=0) + self._timeout
            for connection in wait(list(self._workers), max(0.0, min(5.0, asleep - time.monotonic()))):
                worker = self._workers[connection]  # type: ignore[index]
                try:
                    message = worker.hear()
                    if message[0] == "done":
                        order, worker.order = worker.order, None
                        assert order is not None
                        yield order, message[1], message[2]
                    elif message[0] == "look":
                        worker.waits = True
                        self._asked = self._asked if self._looks else time.monotonic()
                        self._looks.append((worker, message[1], message[2]))
                    if message[0] in ("ready", "done"):
                        worker.ready = True
                        self._give(worker)
                except _Failed as failure:
                    self._replace(worker, str(failure))
            for worker in [one for one in self._workers.values() if not one.waits]:
                patience = self._timeout if worker.ready else max(self._timeout, TIMEOUT)  # starting takes its time
                if time.monotonic() - worker.heard > patience:
                    self._replace(worker, f"no sign of life for {self._timeout:g} s")
            # Waiting for others half as long as a prediction takes makes it larger, and costs at most that.
            busy = [worker.connection for worker in self._workers.values() if not worker.waits]
            if self._looks and not (busy and wait(busy, max(0.0, self._asked + self._patience - time.monotonic()))):
                self._answer()

    def _start(self) -> None:
        self._started += 1
        worker = _Worker(self._job, self._logs / f"{self._started}.log")
        self._workers[worker.connection] = worker

    def _give(self, worker: _Worker) -> None:
        """The next episode; without one the worker goes home."""
        if not self.queue:
            self._drop(worker)
            return
        worker.order = self.queue.popleft()
        worker.send(worker.order)

    def _drop(self, worker: _Worker) -> None:
        del self._workers[worker.connection]
        self._looks = [look for look in self._looks if look[0] is not worker]
        worker.stop()

    def _replace(self, worker: _Worker, reason: str) -> None:
        self._drop(worker)
        what = (
            "starting a worker" if worker.order is None else f"task {worker.order.task}, episode {worker.order.episode}"
        )
        self._failures[what] += 1
        if self._failures[what] >= ATTEMPTS:
            fix = "finished episodes are kept; mend the cause and issue the same command again"
            raise InputError(f"{what} failed {ATTEMPTS} times ({reason})", where=self._job[0].protocol, fix=fix)
        if worker.order is not None:
            self.queue.appendleft(worker.order)
        self._start()

    def _answer(self) -> None:
        """One prediction for everybody who waits."""
        assert isinstance(self._actor, PolicyActor)
        (looks, self._looks), began = (self._looks, []), time.monotonic()
        chunks = self._actor.plan([picture for _, picture, _ in looks], [words for _, _, words in looks])
        check_finite(chunks, self._actor.labels["model"])
        self._patience = (time.monotonic() - began) / 2 if self._actor.batch_size > 1 else 0.0
        for (worker, _, _), chunk in zip(looks, chunks, strict=True):
            try:
                worker.send(chunk)
            except _Failed as failure:
                self._replace(worker, str(failure))

    def stop(self) -> None:
        for worker in list(self._workers.values()):
            self._drop(worker)
