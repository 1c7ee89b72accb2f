"""The rows of an evaluation: written one by one as episodes end, gathered into a folder of rows when it stops.

Beside the folder NAME stands `.NAME.rows.jsonl` while an evaluation runs: first what is evaluated, then one line per
finished episode, flushed. Whoever opens the journal next, after Ctrl-C or kill -9, finds every finished episode.

Trap: the last line may be half-written; it is cut off, and its episode runs again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import EPISODE_COLUMNS, FURTHER_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

KIND = "rollouts"


class Journal:
    """To be used in a `with` block. tasks: the order of the rows. Raises InputError when `out` holds rows of another
    evaluation or anything else, and when another process is writing there."""

    def __init__(self, out: Path, config: dict[str, Any], inputs: dict[str, str], tasks: Sequence[str]) -> None:
        self.out, self._inputs, self._tasks = Path(out), inputs, list(tasks)
        self._config = folders.as_json(config)
        self._path = self.out.with_name(f".{self.out.name}.rows.jsonl")
        self._fresh: list[dict[str, Any]] = []
        self.rows = finished(self.out, self._config, inputs)

    @property
    def done(self) -> set[tuple[str, int]]:
        """(task, episode) of all rows there are."""
        old = [] if self.rows is None else list(zip(self.rows["task"], self.rows["episode"], strict=True))
        return {(str(task), int(episode)) for task, episode in old + [(r["task"], r["episode"]) for r in self._fresh]}

    def __enter__(self) -> Journal:
        import fcntl

        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError("another evaluation into this folder is running", where=self.out) from None
        except OSError:  # a file system without locks
            pass
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise
        return self

    def _recover(self) -> None:
        """Take over what a killed evaluation left; write the first line of a new journal."""
        self._file.seek(0)
        text = self._file.read()
        lines = text.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._file.truncate(sum(len(line.encode()) for line in whole))
        head = folders.as_json({"config": self._config, "inputs": self._inputs})
        if not whole:
            self._write(head)
            return
        if json.loads(whole[0]) != head:
            what = "an evaluation of another policy, protocol or execute length was interrupted here"
            raise InputError(what, where=self.out, fix=f"finish it, or remove {self._path}")
        done = self.done
        for line in whole[1:]:
            row = json.loads(line)
            if (row["task"], row["episode"]) not in done:
                self._fresh.append(row)
                done.add((row["task"], row["episode"]))

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row of an episode that has ended."""
        self._write(row)
        self._fresh.append(row)

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(folders.as_json(value), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._fresh:
                self.rows = save(self.out, self.rows, self._fresh, self._config, self._inputs, self._tasks)
            self._path.unlink(missing_ok=True)
        finally:
            self._file.close()


def finished(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> pd.DataFrame | None:
    """Rows already in `out`, None when there are none; refuses a folder of another evaluation, or of anything else."""
    import pandas as pd

    if not (out / folders.MANIFEST).exists():
        folders.check_replaceable(out, KIND)
        return None
    manifest = folders.read_manifest(out, KIND)
    if manifest["config"] != folders.as_json(config) or manifest["inputs"] != inputs:
        raise InputError(
            "this folder holds rollouts of another policy, protocol or execute length",
            where=out,
            fix="give another --out, or remove it",
        )
    return pd.read_parquet(out / "rows.parquet")


def save(
    out: Path,
    old: pd.DataFrame | None,
    fresh: Iterable[dict[str, Any]],
    config: dict[str, Any],
    inputs: dict[str, str],
    tasks: Sequence[str],
) -> pd.DataFrame:
    """Write old and fresh rows, by task and episode, as the new content of `out`; returns them."""
    import pandas as pd

    rows = list(fresh)
    further = [name for name in FURTHER_COLUMNS if any(name in row for row in rows)]
    added = pd.DataFrame(rows, columns=[*EPISODE_COLUMNS, *further], dtype=object)
    parts = [added] if old is None else [old.astype(object), added]
    table = pd.concat(parts, ignore_index=True)
    place = {task: number for number, task in enumerate(tasks)}
    order = sorted(range(len(table)), key=lambda i: (place.get(table["task"][i], -1), table["episode"][i]))
    table = table.iloc[order].reset_index(drop=True).convert_dtypes()
    with folders.new_folder(out, KIND) as folder:
        table.to_parquet(folder / "rows.parquet", index=False)
        folders.write_manifest(folder, KIND, config=config, inputs=inputs, episodes=len(table))
    return table


def merge(
    out: Path, config: dict[str, Any], inputs: dict[str, str], tasks: Sequence[str], cells: set[tuple[str, int]]
) -> pd.DataFrame:
    """Gather `OUT-shards/i-of-n` into `out`. Raises InputError on missing shards, on episodes that are missing, not
    asked for or there twice, and on shards of another evaluation."""
    import pandas as pd

    home = shards_folder(out)
    found = {path.name: path for path in sorted(home.glob("*-of-*"))}
    totals = {name.rpartition("-")[2] for name in found}
    if len(totals) != 1:
        what = f"shards of {' and '.join(sorted(totals))} parts lie together" if totals else "no shards here"
        raise InputError(what, where=home, fix="run `evaluate … --shard i/n` for every i")
    total = int(totals.pop())
    if absent := [f"{i}/{total}" for i in range(1, total + 1) if f"{i}-of-{total}" not in found]:
        raise InputError(f"shards {', '.join(absent)} are missing", where=home, fix="run them with `--shard`")
    tables = [finished(path, config, inputs) for path in found.values()]
    rows = pd.concat([table.astype(object) for table in tables if table is not None], ignore_index=True)
    keys = list(zip(rows["task"], rows["episode"], strict=True))
    for what, wrong in (
        ("are there twice", {key for key in keys if keys.count(key) > 1}),
        ("are missing", cells - set(keys)),
        ("were not asked for", set(keys) - cells),
    ):
        if wrong:
            named = ", ".join(f"{task}:{episode}" for task, episode in sorted(wrong)[:5])
            fix = "finish the shards with the same --tasks and --episodes"
            raise InputError(f"{len(wrong)} episodes {what} ({named}{', …' * (len(wrong) > 5)})", where=home, fix=fix)
    finished(out, config, inputs)  # refuses a folder of something else
    return save(out, None, rows.to_dict("records"), config, inputs, tasks)


def shards_folder(out: Path) -> Path:
    """Where the shards of an evaluation into `out` lie."""
    return out.with_name(f"{out.name}-shards")
