"""Opens a file of unknown kind by its first bytes: SQLite, JSON, JSON lines, CSV or TSV, parquet, xlsx.

Trap: an SQLite file that is being written looks whole. It is opened read-only and immutable (so a running evaluation
is never disturbed), and therefore refused while a journal lies beside it, while it is locked, or when it changed under
the reader.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from probes.imports.rows import Content
from vlm4vla_core.errors import InputError

_PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def open_content(path: Path) -> Content:
    """Read a file. Raises InputError when it is missing, empty, cut short, or of a kind that is not read."""
    if path.is_dir():
        raise InputError("this is a folder", where=path, fix="name the result files in it")
    if not path.is_file():
        raise InputError("no such file", where=path)
    with path.open("rb") as handle:
        head = handle.read(16)
    if not head:
        raise InputError("the file is empty", where=path)
    if head.startswith(b"SQLite format 3\0"):
        return Content(path, "sqlite")
    if head.startswith(_PICKLE) or path.suffix in (".pkl", ".pickle"):
        raise InputError(
            "this is a pickle, which is never opened", where=path, fix="give the CSV or JSON of the result"
        )
    if head.startswith((b"PAR1", b"PK\x03\x04")):
        return Content(path, "table", _binary_table(path, head))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        fix = "save a table as CSV in UTF-8"
        raise InputError("neither UTF-8 text nor any binary format that is read", where=path, fix=fix) from None
    if not text.strip():
        raise InputError("the file is empty", where=path)
    return _json(path, text) if text.lstrip()[0] in "{[" else Content(path, "table", _text_table(path, text))


def _json(path: Path, text: str) -> Content:
    try:
        value = json.loads(text)
        # One line of a JSON-lines file is whole JSON; what it is decides the readers.
        return Content(path, "json", value)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if error.msg != "Extra data" or len(lines) < 2:
            raise InputError(f"not valid JSON ({error}); cut short?", where=path, fix="copy the file again") from None
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            what = f"line {place} is not valid JSON ({error.msg}); cut short?"
            raise InputError(what, where=path, fix="copy the file again") from None
    return Content(path, "jsonl", rows)


def _text_table(path: Path, text: str) -> Any:
    """Every cell as its text. pandas' own reader would take a row with a cell too many for one with a label."""
    import pandas as pd

    header = text.lstrip().splitlines()[0]
    separator = next((one for one in "\t;" if one in header and "," not in header), "\t" if "\t" in header else ",")
    try:
        rows = [row for row in csv.reader(StringIO(text, newline=""), delimiter=separator, strict=True) if any(row)]
    except csv.Error as error:
        raise InputError(f"cannot be read as a table ({error})", where=path) from None
    for place, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            what = f"row {place} has {len(row)} cells, the header {len(rows[0])}"
            raise InputError(what, where=path, fix="quote a cell that holds the separator")
    return _named(pd.DataFrame(rows[1:], columns=rows[0], dtype=object), path)


def _binary_table(path: Path, head: bytes) -> Any:
    import pandas as pd

    try:
        frame = pd.read_parquet(path) if head.startswith(b"PAR1") else pd.read_excel(path, dtype=str)
    except ImportError:
        raise InputError("xlsx needs openpyxl", where=path, fix="pip install openpyxl, or save it as CSV") from None
    except Exception as error:  # a damaged file raises whatever its library met first
        raise InputError(f"cannot be read as a table ({str(error).strip().splitlines()[0]})", where=path) from None
    return _named(frame, path)


def _named(frame: Any, path: Path) -> Any:
    frame.columns = [str(column).strip() for column in frame.columns]
    if frame.empty:
        raise InputError("the table has no rows", where=path)
    if twice := sorted({name for name in frame.columns if list(frame.columns).count(name) > 1}):
        raise InputError(f"two columns are called {twice[0]}", where=path, fix="rename one")
    return frame


@contextmanager
def sqlite_rows(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only, immutable connection. Raises InputError for a database that is locked, half-written or damaged."""
    for beside in ("-wal", "-journal"):
        left = path.with_name(path.name + beside)
        if left.exists() and left.stat().st_size:
            what = f"an evaluation is writing to this database, or was killed while it did ({left.name} lies beside it)"
            raise InputError(what, where=path, fix="let the evaluation finish, or open it once with its own tool")
    before = path.stat()
    uri = path.resolve().as_uri()
    try:
        with closing(sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=0.2)) as probe:
            probe.execute("SELECT count(*) FROM sqlite_master").fetchone()
        with closing(sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            fix = "let the evaluation finish, or copy the file"
            raise InputError("the database is locked by another program", where=path, fix=fix) from None
        raise InputError(f"not a readable database ({str(error).splitlines()[0]})", where=path) from None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        what = f"the database is damaged ({str(error).splitlines()[0]})"
        raise InputError(what, where=path, fix="copy the file again") from None
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise InputError("the database changed while it was read", where=path, fix="let the evaluation finish")


def tables(path: Path) -> dict[str, set[str]]:
    """Table name -> its columns."""
    with sqlite_rows(path) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: {row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')} for name in names}
