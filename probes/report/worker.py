"""Worker processes for notebooks, which end with the process that started them, and leave nothing behind.

A Ctrl-C reaches a terminal's whole process group, and Jupyter's client answers it in the middle of a cell with
tracebacks and half a minute of waiting. So the workers do not see it: the parent alone does, and lets go of a pipe
(the lifeline). Its end, which also comes when the parent is killed, tells every worker to kill its kernel, to remove
what it was writing and to end.

Trap: nobody else may hold the lifeline's writing end; a forked worker would, and none would ever end.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

LAUNCHING = threading.Lock()  # held while a kernel starts, so that none is overlooked by `_abandon`
KERNELS: set[int] = set()  # process ids of this process's kernels; each leads a process group of its own
_unfinished: set[Path] = set()


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Within, `folder` is half-written: it is removed when this worker must end."""
    _unfinished.add(folder)
    try:
        yield folder
    finally:
        _unfinished.discard(folder)


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes that all end within a second when the block is left by an exception.

    Submit within `unseen_interrupt()`: the workers start then.
    """
    from multiprocessing import get_context

    context = get_context("spawn")  # a forked child would inherit sockets and threads, and the lifeline's writing end
    reader, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(reader,))
    try:
        yield pool
    except BaseException:
        lifeline.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        lifeline.close()
        reader.close()


@contextmanager
def unseen_interrupt() -> Iterator[None]:
    """Within, a Ctrl-C waits; processes started here (and theirs) never see one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(lifeline: Connection) -> None:
    """In a new worker: end when the lifeline does, or on SIGTERM, which the pool sends when another one ended."""

    def watch() -> None:
        try:
            lifeline.recv_bytes()  # nothing is ever sent
        except (EOFError, OSError):
            _abandon()

    def wait_for_signal() -> None:
        signal.sigwait([signal.SIGTERM])
        _abandon()

    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # else it would end this process in mid-removal
        threading.Thread(target=wait_for_signal, name="terminate", daemon=True).start()
    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _abandon() -> NoReturn:
    LAUNCHING.acquire()  # for good: no kernel starts any more
    for process in KERNELS:
        try:
            if os.name == "posix":
                os.killpg(process, signal.SIGKILL)
            else:
                os.kill(process, signal.SIGTERM)
        except OSError:
            pass  # it has ended
    for folder in list(_unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(130)  # not `sys.exit`: the main thread waits for a kernel that is gone
