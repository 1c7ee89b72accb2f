"""Run what is missing of a study: each job once what it needs is done, several at a time, here or on a Ray cluster.

Trap: one process may drive a study at a time (it holds a lock on the folder); others may look at its status. On a
cluster the study's folder has to be on a file system that all machines share.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.progress import progress
from vlm4vla_core.run_folder import locked
from vlm4vla_core.study.jobs import CONFIG, Job, Plan, write_toml
from vlm4vla_core.study.state import FAILED, MISSING, Status, beating, jobs_folder, look
from vlm4vla_core.study.work import perform

STUDY = "study.json"
RETRIES = 3  # of a task of Ray whose worker or machine died


class Executor(Protocol):
    """Where jobs run: at most `slots` at a time."""

    slots: int

    def submit(self, folder: Path, words: list[str], amount: int, gpus: int, threads: int) -> Future[int]:
        """Begin a job (arguments as those of `perform`; gpus 0: it is kept from them); the future is its exit code."""
        ...

    def room(self, gpus: int) -> bool:
        """Whether a job that takes so many GPUs can begin now."""
        ...

    def stop(self) -> None:
        """Interrupt what runs, and wait until it has saved."""
        ...


class Local:
    """Processes on this machine, each with GPUs of its own where there are any.

    slots: jobs at a time; by default one per GPU, else as many as have `threads` cores each.
    """

    def __init__(self, slots: int | None = None, gpus: list[int] | None = None, threads: int = 0) -> None:
        self.gpus = local_gpus() if gpus is None else list(gpus)
        self.slots = slots or (len(self.gpus) or max(1, (os.cpu_count() or 1) // (threads or 2)))
        self._free = list(self.gpus)
        self._pool, self._stop = ThreadPoolExecutor(self.slots), threading.Event()

    def room(self, gpus: int) -> bool:
        return not self.gpus or len(self._free) >= min(gpus, len(self.gpus))

    def submit(self, folder: Path, words: list[str], amount: int, gpus: int, threads: int) -> Future[int]:
        mine = [self._free.pop(0) for _ in range(min(gpus, len(self.gpus)))]
        seen = mine if gpus else None
        future = self._pool.submit(
            perform, folder, words, amount=amount, gpus=seen, threads=threads, stop=self._stop
        )  # fmt: skip
        future.add_done_callback(lambda _: self._free.extend(mine))
        return future

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ray:
    """Tasks of a Ray cluster. Ray repeats one whose worker or machine died; a job whose task is lost for good has
    failed, and takes none of the others with it."""

    def __init__(self, address: str | None, slots: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise InputError("Ray is not installed", fix="pip install 'vlm4vla[cluster]'") from None
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            what = f"no Ray cluster answers ({str(error).splitlines()[0]})"
            raise InputError(what, where=address or "local", fix="start one with `ray start --head`") from None
        self._ray, self.cluster, self._tasks = ray, ray.cluster_resources(), list[Any]()
        self.slots = slots or max(1, int(self.cluster.get("GPU", 0) or self.cluster.get("CPU", 1)))

    def room(self, gpus: int) -> bool:
        return True  # Ray queues

    def submit(self, folder: Path, words: list[str], amount: int, gpus: int, threads: int) -> Future[int]:
        taken = min(gpus, int(self.cluster.get("GPU", 0)))
        task = self._ray.remote(num_cpus=threads or 1, num_gpus=taken, max_retries=RETRIES)(_on_ray)
        self._tasks.append(task.remote(str(folder.resolve()), words, amount, taken if gpus else None, threads))
        code: Future[int] = Future()
        self._tasks[-1].future().add_done_callback(lambda task: code.set_result(self._came(task, folder)))
        return code

    def _came(self, task: Future[int], folder: Path) -> int:
        """A task's exit code, or what stands for one that never ended."""
        lost = task.exception()
        if lost is None:
            return task.result()
        if isinstance(lost, self._ray.exceptions.TaskCancelledError):
            return 130
        reason = f"Ray lost it for good ({type(lost).__name__}: {str(lost).strip().splitlines()[0][:200]})"
        folders.write_json(folder / FAILED, {"reason": reason, "seconds": 0.0, "tries": 1 + RETRIES, "code": 1})
        return 1

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)
        self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=90)


def _on_ray(folder: str, words: list[str], amount: int, gpus: int | None, threads: int) -> int:
    wait_for_another(Path(folder))
    return perform(Path(folder), words, amount=amount, gpus=gpus, threads=threads)


def wait_for_another(folder: Path, pause: float = 1.0) -> None:
    """Wait while another process works on a job: a machine that the cluster has lost may still be at it.

    A process of this machine is seen to be gone; of one elsewhere only the sign of life tells.
    """
    while (facts := beating(folder)) is not None:
        if facts["host"] == platform.node():
            try:
                os.kill(facts["pid"], 0)
            except ProcessLookupError:
                return
        time.sleep(pause)


def local_gpus() -> list[int]:
    """Numbers of the GPUs that may be used here, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [int(word) for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if word.strip().isdigit()]
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    return list(range(sum(line.startswith("GPU ") for line in done.stdout.splitlines())))


@contextmanager
def held(out: Path, plan: Plan) -> Iterator[None]:
    """Hold the study's folder, and keep the declaration in it. Raises InputError when it is another study's."""
    out = Path(out)
    if (out / STUDY).is_file():
        name = folders.read_json(out / STUDY).get("name")
        if name != plan.study.name:
            raise InputError(f"this folder holds the study '{name}'", where=out, fix="give another --out")
    elif out.exists() and any(path.name != ".lock" for path in out.iterdir()):
        raise InputError("this folder exists and holds no study", where=out, fix="give another --out")
    with locked(out, "another process is running the study in this folder"):
        folders.write_json(out / STUDY, {"name": plan.study.name, "study": plan.study.model_dump(mode="json")})
        yield


def run(plan: Plan, out: Path, executor: Executor, *, told: Callable[[Job, int], None] | None = None) -> Status:
    """Do all missing jobs of a plan; returns what has become of them.

    A job that fails stops what needs it and nothing else; one that failed before is tried again. told: called as each
    job ends, with its exit code. Raises InputError as `held`; KeyboardInterrupt once running jobs have saved.
    """
    with held(out, plan), progress(total=len(look(plan, out).wanted), what=plan.study.name, unit="job") as bar:
        try:
            return _drive(plan, out, executor, bar, told or (lambda job, code: None))
        except KeyboardInterrupt:
            executor.stop()
            raise


def _drive(plan: Plan, out: Path, executor: Executor, bar: Any, told: Callable[[Job, int], None]) -> Status:
    tried, running = set[str](), dict[Future[int], Job]()
    while True:
        status = look(plan, out)
        bar.n = len(status.of("done", "shipped"))
        bar.refresh()
        # Blocked: by what failed earlier and may do better now. Running: begun by a study that was killed since.
        for one in status.of("ready", "failed", "blocked", "running"):
            job = plan.jobs[one]
            before = all(status.states[need].state == "done" for need in job.needs.values())
            if one in tried or not before or status.states[one].note.startswith(MISSING):
                continue
            if len(running) < executor.slots and executor.room(job.gpus):
                tried.add(one)
                running[_begin(plan, job, out, executor)] = job
        if not running:
            return status
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            told(running.pop(future), future.result())


def _begin(plan: Plan, job: Job, out: Path, executor: Executor) -> Future[int]:
    """Write down what a job is, and submit it."""
    jobs = jobs_folder(out).resolve()
    folder, words = jobs / job.folder, job.command(jobs, plan.jobs)
    folder.mkdir(parents=True, exist_ok=True)
    if job.config is not None:
        write_toml(folder / CONFIG, job.config)
    facts: dict[str, Any] = {"id": job.id, "kind": job.kind, "name": job.name, "spec": job.spec, "needs": job.needs}
    folders.write_json(folder / "job.json", {**facts, "command": words})
    return executor.submit(folder, words, job.amount, job.gpus, plan.study.resources.threads)
