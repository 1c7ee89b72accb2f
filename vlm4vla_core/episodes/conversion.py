"""A source into a store: unit by unit, in many processes, on many machines and in as many attempts as it takes.

Beside the final folder stands `.NAME.partial`: finished shards under `store/`, one record per finished unit under
`parts/`, what is being written under `work/`. A unit counts when its record is there, with the same settings and
unchanged files; so nothing is done twice after a kill, and the bytes are those of an undisturbed run.
Trap: which episodes repeat an earlier split is known only when all units are there, so they go at the very end.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.episodes import assemble
from vlm4vla_core.episodes.source import Skipped, Source, Unit
from vlm4vla_core.episodes.writer import KIND, MANIFEST, Part, Recipe, Writer
from vlm4vla_core.errors import InputError
from vlm4vla_core.progress import progress

_WORTH, _RECORDED = 1 << 23, 1 << 21  # bytes of source files; starting a process takes two to four seconds
LOOKS = 64  # episodes in which a camera that nobody named must show something


@dataclass(frozen=True)
class Job:
    """What a process needs to convert any unit. key: fingerprint of everything but the data."""

    source: Source
    recipe: Recipe
    cameras: tuple[str, ...]
    transform: str
    partial: Path
    key: str

    def record(self, index: int) -> Path:
        return self.partial / "parts" / f"{index:06d}.json"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def enough(units: Sequence[Unit]) -> int:
    """Processes worth their start: one per core, but no more than there are `_WORTH` bytes of source files for.

    A unit without files (a recording) counts as `_RECORDED` bytes: it takes about a second.
    """
    most, total = cores(), 0
    for unit in units:
        files = [path.stat().st_size for path in unit.files if path.is_file()]
        total += sum(files) if files else _RECORDED
        if total >= most * _WORTH:
            return most
    return 1 + total // _WORTH


def partial_folder(out: Path) -> Path:
    """Where an unfinished conversion into `out` keeps what it has."""
    out = Path(out).resolve()
    return out.with_name(f".{out.name}.partial")


def up_to_date(out: Path, source: Source, units: Sequence[Unit], config: Mapping[str, Any]) -> bool:
    """True when `out` is a whole store made with this config from these very files.

    A file whose size and modification time are those of the conversion is taken to be the same, any other is hashed.
    """
    try:
        manifest = folders.read_manifest(out, KIND, name=MANIFEST)
    except InputError:
        return False
    inputs, stamps = manifest["inputs"], manifest.get("stamps", {})
    now = {
        unit.name: inputs.get(unit.name, "") if stamps.get(unit.name) == stamp(source, unit) else content(source, unit)
        for unit in (units if set(inputs) == {unit.name for unit in units} else ())
    }
    return folders.current(out, KIND, config=config, inputs=now, name=MANIFEST)


def tidy(out: Path) -> None:
    """Remove what a conversion left that was killed after its store had been put in place."""
    partial = partial_folder(out)
    if partial.is_dir() and not (partial / "store").exists():
        shutil.rmtree(partial, ignore_errors=True)


def stamp(source: Source, unit: Unit) -> str:
    """Fingerprint of the names, sizes and modification times of a unit's files: cheap, and changes when they do."""
    return folders.fingerprint([[_short(source, path), *_size_and_time(path)] for path in unit.files])


def content(source: Source, unit: Unit) -> str:
    """What a unit's files hold, as the manifest's `inputs` has it."""
    digest, sizes = hashlib.sha256(), []
    for path in unit.files:
        size, time = _size_and_time(path)
        sizes.append(size)
        digest.update(f"{_short(source, path)} {_hash(path, size, time)}\n".encode())
    return f"{len(sizes)} files, {sum(sizes)} bytes, sha256 {digest.hexdigest()[:16]}"


def _short(source: Source, path: Path) -> str:
    return path.relative_to(source.folder).as_posix() if path.is_relative_to(source.folder) else path.name


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except FileNotFoundError:
        raise InputError("a file of the source is missing", where=path, fix="fetch it again") from None
    return about.st_size, about.st_mtime_ns


@lru_cache(maxsize=256)  # units share files: descriptions, and videos of many episodes
def _hash(path: Path, size: int, time: int) -> str:
    return folders.file_fingerprint(path)


# --- one unit -------------------------------------------------------------------------------------------


def convert_unit(job: Job, index: int, unit: Unit, told: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Convert one unit; its shards and then its record are put in place. Returns the record.

    told: called with the steps of each episode. Raises InputError as the reader and the writer do.
    """
    work = job.partial / "work" / f"{index:06d}.{folders.here()}"
    work.mkdir(parents=True)
    try:
        # Hashed first: then the reader finds the file in memory, and a file that changes meanwhile is noticed later.
        inputs, stamped = content(job.source, unit), stamp(job.source, unit)
        writer, left_out = Writer(work, job.recipe, f"steps-{index:06d}-"), Counter[str]()
        for one in job.source.episodes(unit, job.cameras, job.transform):
            if isinstance(one, Skipped):
                left_out[one.reason] += 1
            else:
                writer.add(one)
                if told:
                    told(len(one.action))
        part = writer.close()
        part.left_out = dict(left_out)
        record = {"key": job.key, "unit": unit.name, "stamp": stamped, "inputs": inputs, "repeats": 0}
        record |= _described(work, part)
        for name in part.shards:
            (work / name).replace(job.partial / "store" / name)
        folders.write_json(job.record(index), record)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return record


def _described(folder: Path, part: Part) -> dict[str, Any]:
    """A part as JSON, with the size and fingerprint of each of its shards."""
    files = {name: [(folder / name).stat().st_size, folders.file_fingerprint(folder / name)] for name in part.shards}
    return {"files": files, "part": asdict(part)}


def _finished(job: Job, index: int, unit: Unit) -> dict[str, Any] | None:
    """The unit's record, when it still holds."""
    path = job.record(index)
    if not path.is_file():
        return None
    record = folders.read_json(path, fix=f"remove {job.partial}")
    same = (record["key"], record["unit"], record["stamp"]) == (job.key, unit.name, stamp(job.source, unit))
    shards = {job.partial / "store" / name: size for name, (size, _) in record["files"].items()}
    whole = all(shard.is_file() and shard.stat().st_size == size for shard, size in shards.items())
    return record if same and whole else None


# --- all of them ----------------------------------------------------------------------------------------


def convert(
    out: Path,
    source: Source,
    units: Sequence[Unit],
    recipe: Recipe,
    *,
    cameras: tuple[str, ...],
    transform: str,
    config: Mapping[str, Any],
    black: Sequence[str] = (),
    workers: int | None = None,
    shard: tuple[int, int] = (1, 1),
) -> tuple[dict[str, Any] | None, int]:
    """Convert what is missing; with the last unit the store at `out` appears. Returns its account and how many frames
    were converted now.

    black: cameras that were left out, for the account. workers: processes, None for `enough`. shard: (i, n) does every
    n-th unit from the i-th on and does not finish the store; then the account is None. Raises InputError as the reader
    does, when the disk is full, when a worker is killed, and when another conversion into this store is running; what
    is finished is kept, and issuing the same again goes on from there.
    """
    out = Path(out).resolve()
    folders.check_replaceable(out, KIND)
    folders.recover(out)
    partial = partial_folder(out)
    key = folders.fingerprint({"config": dict(config), "cameras": cameras, "recipe": recipe.to_dict()})
    job = Job(source, recipe, cameras, transform, partial, key)
    mine = list(range(len(units)))[shard[0] - 1 :: shard[1]]
    with _room(partial, config, alone=shard == (1, 1)):
        try:
            records, frames = _convert_missing(job, units, mine, workers or enough(units))
            if shard != (1, 1):
                return None, frames
            told = _finish(job, out, units, records, config, black)
        except OSError as error:
            reason = "the disk is full" if error.errno == 28 else f"cannot go on ({error})"
            kept = len(list((partial / "parts").glob("*.json")))
            fix = f"then issue the same command again: {kept} of {len(units)} parts are kept"
            raise InputError(reason, where=partial, fix=f"make room, {fix}" if error.errno == 28 else fix) from None
    shutil.rmtree(partial, ignore_errors=True)
    return told, frames


def _convert_missing(
    job: Job, units: Sequence[Unit], mine: Sequence[int], workers: int
) -> tuple[dict[int, dict[str, Any]], int]:
    """The records of these units, in order, and the frames of those that had to be made."""
    records = {index: record for index in mine if (record := _finished(job, index, units[index]))}
    todo = [index for index in mine if index not in records]
    with progress(total=len(mine), what="convert", unit="part") as bar:
        bar.initial = bar.n = len(records)
        frames = 0

        def told(steps: int) -> None:
            nonlocal frames
            frames += steps * len(job.cameras)
            seconds = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{frames} frames, {frames / seconds:.0f}/s", refresh=False)

        def done(index: int, record: dict[str, Any]) -> None:
            part = Part(**record["part"])
            if first := next((other for other in records.values() if other["part"]["rows"]), None):
                assemble.agree(units[index].name, part, first["unit"], Part(**first["part"]).declared)
            records[index] = record
            bar.update()

        if min(workers, len(todo)) <= 1:
            for index in todo:
                done(index, convert_unit(job, index, units[index], told))
        else:
            for index, record in _in_processes(job, units, todo, min(workers, len(todo))):
                told(sum(row["length"] for row in record["part"]["rows"]))
                done(index, record)
    return {index: records[index] for index in mine}, frames


def _in_processes(
    job: Job, units: Sequence[Unit], todo: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_alone_no_longer) as pool:
        futures = {pool.submit(convert_unit, job, index, units[index]): index for index in todo}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed (often for lack of memory)",
                where=job.partial,
                fix="issue the same command again, with fewer --workers if memory is short; finished parts are kept",
            ) from None
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, InputError | OSError):  # interrupted: do not wait for units that take minutes
                for child in multiprocessing.active_children():
                    child.terminate()
            raise


def _alone_no_longer() -> None:
    """A worker leaves interrupts to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


@contextmanager
def _room(partial: Path, config: Mapping[str, Any], *, alone: bool) -> Iterator[None]:
    """The folder of an unfinished conversion, locked; it goes again when nothing came to be kept."""
    import fcntl

    for name in ("store", "parts", "work"):
        (partial / name).mkdir(parents=True, exist_ok=True)
    folders.sweep(partial / "work")
    with (partial / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait until it has ended"
            raise InputError("another conversion into this store is running", where=partial, fix=fix) from None
        except OSError:  # a file system without locks
            pass
        plan = partial / "plan.json"
        wanted = folders.as_json(config)
        if plan.is_file() and folders.read_json(plan, fix=f"remove {partial}") != wanted:
            fix = f"finish it with those settings, or remove {partial}"
            raise InputError("an unfinished conversion with other settings is here", where=partial, fix=fix)
        folders.write_json(plan, wanted)
        try:
            yield
        finally:
            if partial.is_dir() and not any((partial / "parts").iterdir()) and alone:
                shutil.rmtree(partial, ignore_errors=True)


def _finish(
    job: Job,
    out: Path,
    units: Sequence[Unit],
    records: dict[int, dict[str, Any]],
    config: Mapping[str, Any],
    black: Sequence[str],
) -> dict[str, Any]:
    """Leave repeated episodes out, write the tables and the manifest, and put the store in its place."""
    store = job.partial / "store"
    parts = [Part(**record["part"]) for record in records.values()]
    first = next((index for index, part in enumerate(parts) if part.rows), 0)
    for unit, part in zip(units, parts, strict=True):
        assemble.agree(unit.name, part, units[first].name, parts[first].declared)
    for index, gone in enumerate(assemble.repeated(parts, [unit.split for unit in units])):
        if gone:
            parts[index] = assemble.without(store, parts[index], gone)
            records[index] |= {"repeats": len(gone), **_described(store, parts[index])}
            folders.write_json(job.record(index), records[index])
    left_out, notes, repeats = Counter[str](), Counter[str](), Counter[str]()
    for unit, record, part in zip(units, records.values(), parts, strict=True):
        left_out.update(part.left_out)
        notes.update(part.notes)
        repeats.update({unit.split: record["repeats"]} if record["repeats"] else {})
    kept = sum(len(part.rows) for part in parts)
    told = {
        "read": kept + left_out.total() + repeats.total(),
        "kept": kept,
        "left_out": dict(sorted(left_out.items())),
        "duplicates": dict(repeats),
        "black_cameras": list(black),
        "notes": dict(sorted(notes.items())),
    }
    if not kept:
        shutil.rmtree(job.partial, ignore_errors=True)
        reasons = "; ".join(lines(told)) or "the splits hold no episodes"
        raise InputError("no episodes to convert", where=job.source.folder, fix=reasons)
    hashes = {name: entry[1] for record in records.values() for name, entry in record["files"].items()}
    for path in store.iterdir():  # of attempts with other settings, and shards before repeats went
        if path.name not in hashes:
            path.unlink()
    assemble.finish(
        store,
        parts,
        job.recipe,
        config=config,
        inputs={record["unit"]: record["inputs"] for record in records.values()},
        hashes=hashes,
        stamps={record["unit"]: record["stamp"] for record in records.values()},
        source=job.source.name,
        transform=job.transform,
        account=told,
    )
    folders.publish(store, out)
    return told


def lines(account: Mapping[str, Any]) -> list[str]:
    """An account in readable lines, none when nothing was left out or mended."""
    out = []
    if account["black_cameras"]:
        out.append(f"black everywhere and left out: {', '.join(account['black_cameras'])}")
    out += [f"{n} episodes of split '{split}' repeat an earlier split" for split, n in account["duplicates"].items()]
    out += [f"{n} episodes {reason} left out" for reason, n in account["left_out"].items()]
    return out + [f"{n} {note}" for note, n in account["notes"].items()]
