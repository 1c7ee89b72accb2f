"""Carry out one job: call its verb in a process of its own, with a log and a sign of life. Every executor calls this.

Trap: the verb resumes by itself from what its product folder holds, so a job that died is simply called again; nothing
of a job's folder is ever removed here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.study.state import BEAT, DONE, FAILED, RUNNING

LOG = "log.txt"
_KILL_WITH_PARENT = 1  # Linux: PR_SET_PDEATHSIG


def hardware_class(threads: int, gpus: int) -> str:
    """What decides rounding: the processor's model, torch's version, threads, and the GPU where one is used."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        name = platform.processor() or name
    if gpus and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
        name += f", {gpus} x {found[0].strip()}" if found else ""
    return f"{name}, torch {metadata.version('torch')}, {threads or 'its own'} threads"


def perform(
    folder: Path, words: Sequence[str], *, amount: int, gpus: Sequence[int] | int | None = (), threads: int = 0,
    stop: threading.Event | None = None,
) -> int:  # fmt: skip
    """Call `vlm4vla WORDS`, and write what came of it into the job's folder; returns the exit code.

    amount: episodes asked for. gpus: numbers of those to be seen, or how many the caller has set aside; more than one
    go through torchrun; None hides them all. threads: of torch, 0 for its own choice. stop: when set, the verb is
    interrupted, which saves; that is neither done nor failed.
    """
    folder, began = Path(folder), time.time()
    tries = 1 + (folders.read_json(folder / FAILED)["tries"] if (folder / FAILED).is_file() else 0)
    count = 0 if gpus is None else gpus if isinstance(gpus, int) else len(gpus)
    environment = dict(os.environ)
    if gpus is None:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif not isinstance(gpus, int) and gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "vlm4vla_core.cli", *words]
    facts: dict[str, Any] = {"host": platform.node(), "began": began, "tries": tries}
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n$ vlm4vla {' '.join(words)}\n")
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        folders.write_json(folder / RUNNING, {**facts, "pid": process.pid})
        try:
            code = _watch(process, folder / RUNNING, stop)
        finally:
            if process.poll() is None:  # interrupted ourselves
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
            (folder / RUNNING).unlink(missing_ok=True)
    facts |= {"seconds": round(time.time() - began, 2), "code": code, "amount": amount}
    if code == 0:
        facts["hardware"] = hardware_class(threads, count)
        (folder / FAILED).unlink(missing_ok=True)
        folders.write_json(folder / DONE, {**facts, "made_by": folders.provenance()})
    elif code not in (130, -signal.SIGINT):
        folders.write_json(folder / FAILED, {**facts, "reason": _reason(folder / LOG, start, code)})
    return code


def _watch(process: subprocess.Popen[bytes], running: Path, stop: threading.Event | None) -> int:
    """Wait for a process, refreshing its sign of life."""
    while True:
        try:
            return process.wait(timeout=BEAT)
        except subprocess.TimeoutExpired:
            os.utime(running)
            if stop is not None and stop.is_set():
                process.send_signal(signal.SIGINT)


def _die_with_parent() -> None:
    """A killed study must not leave a job behind that the next one would run into."""
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)


def _reason(log: Path, start: int, code: int) -> str:
    """The last line that the verb printed, or the signal that ended it."""
    with log.open(encoding="utf-8", errors="replace") as handle:
        handle.seek(start)
        lines = [line.strip() for line in handle if line.strip()]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (f" after: {lines[-1][:200]}" if lines else "")
    return re.sub(r"^vlm4vla [a-z-]+: ", "", lines[-1])[:400] if lines else f"exit code {code}, nothing printed"
