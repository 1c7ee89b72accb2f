"""Read other evaluators' result files into this project's tables, ready for `correlate` and `compare`.

Read are vla-evaluation-harness recordings (SQLite) and result JSON, LeRobot's eval_info.json, lmms-eval results and
samples, VLMEvalKit's status.json, score tables and judged answers, and tables of your own (CSV, parquet). The content
says what a file is, not its name. Several files become one table; to add to a table, name it among the files.

Two files with different values for the same score are an error that names both; what a file does not say stays
"unknown". Trap: models are joined by their exact names, and every evaluator writes them otherwise: see --model.

Example: vlm4vla import-results runs/recording-1a2b.sqlite --model my-vla --out episodes.parquet
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.imports.merge import Table
    from probes.imports.rows import Content, Imported, Labels

Kind = Literal["auto", "vla-eval", "lerobot", "lmms-eval", "vlmevalkit", "csv"]


@dataclass(frozen=True)
class Args:
    sources: Positional[tuple[Path, ...]]
    """Result files, and tables to add to."""
    table: Annotated[Path, tyro.conf.arg(name="out")]
    """The table to write, .parquet or .csv. One that is there is only replaced when it is among the files."""
    kind: Kind = "auto"
    """What the files are; auto looks at their content."""
    rows: Annotated[Literal["episodes", "performance", "capability"] | None, tyro.conf.arg(name="as")] = None
    """What to make of them. Episodes can be counted up: --as performance."""
    model: str = ""
    """The model's name, where a file does not say it or says it otherwise than your other tables."""
    family: str = ""
    """The model's family, such as qwen2_5_vl."""
    lineage: str = ""
    """Who trained the VLM, such as Qwen: models of one lineage are not independent."""
    benchmark: str = ""
    """The benchmark's name, where a file does not say it or cuts it into several."""
    run_id: str = ""
    """Name of the run, to keep a repeated evaluation apart from the first."""
    unit: Literal["", "fraction", "percent", "points"] = ""
    """Unit of scores whose file does not say it."""
    only: tuple[str, ...] = ()
    """Take the benchmarks that match one of these patterns, such as 'mmmu*' (also the sub-scores of VLMEvalKit)."""
    json: Path | None = None
    """Also write what was read, merged and left open as JSON."""


def run(args: Args) -> int:
    from probes.imports.merge import merge

    if not args.sources:
        raise InputError("no files to import", fix="name at least one result file")
    if args.table.suffix not in (".parquet", ".csv"):
        raise InputError(f"a table is .parquet or .csv, not '{args.table.suffix}'", where=args.table)
    if args.table.is_dir():
        raise InputError("--out names a folder, not a table", where=args.table)
    for place, source in enumerate(args.sources):
        if source.resolve() in [other.resolve() for other in args.sources[:place]]:
            raise InputError("the same file is named twice", where=source)
    parts = [_chosen(part, args) for part in _read_all(args)]
    parts = [part for part in parts if len(part.frame)]
    if not parts:
        raise InputError("no benchmark matches", where=", ".join(args.only), fix="see the names without --only")
    table = merge(parts, args.rows)
    state = _write(table, args)
    _print(table, parts, args, state)
    if args.json:
        _report(args.json, table, parts, args)
    return 0


def _read_all(args: Args) -> list[Imported]:
    """Every file's rows. What the user states is about other evaluators' files: a table among them, which was imported
    before, keeps its own labels."""
    from probes.imports import tables
    from probes.imports.content import open_content
    from probes.imports.rows import FRACTION, PERCENT, Labels

    unit = {"fraction": FRACTION, "percent": PERCENT}.get(args.unit, args.unit)
    stated = Labels(args.model, args.family, args.lineage, args.benchmark, args.run_id, unit)
    contents = [open_content(source) for source in args.sources]
    readers = [_reader(content, args) for content in contents]
    parts = []
    for content, reader in zip(contents, readers, strict=True):
        if reader is tables:
            own = any(one is not tables for one in readers) or content.path.resolve() == args.table.resolve()
            parts.append(tables.read(content, Labels() if own else stated, args.rows))
        else:
            parts.append(_stated(reader.read(content, stated), stated))
    if args.model and len(names := dict.fromkeys(part.says for part in parts if part.says)) > 1:
        what = f"--model {args.model} would give one name to {' and '.join(names)}"
        raise InputError(what, fix="import them one after the other")
    return parts


def _stated(part: Imported, labels: Labels) -> Imported:
    """A stated benchmark must not give one name to several scores."""
    names = part.frame["benchmark"]
    if part.rows == "capability" and labels.benchmark and names.duplicated().any():
        what = f"--benchmark {labels.benchmark} would give one name to {len(names)} scores"
        raise InputError(what, where=part.path, fix="leave it out, and choose scores with --only")
    return part


def _readers():
    from probes.imports import lerobot, lmms_eval, tables, vla_eval, vlmevalkit

    return {"vla-eval": vla_eval, "lerobot": lerobot, "lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit, "csv": tables}


def _reader(content: Content, args: Args):
    readers = _readers()
    able = [kind for kind, reader in readers.items() if reader.recognises(content)]
    beside = able == ["csv"] and len(args.sources) > 1  # a table that is added to
    if args.kind != "auto" and not beside:
        loose = args.kind == "vlmevalkit" and content.form in ("table", "json") and not able  # its scores have no marks
        if args.kind not in able and not loose:
            what = f"this is no file of {args.kind}" + (f"; it looks like {' or '.join(able)}" if able else "")
            raise InputError(what, where=content.path, fix="leave --kind out, or name another")
        return readers[args.kind]
    if len(able) == 1:
        return readers[able[0]]
    if able:
        what = f"this could be a file of {' or of '.join(able)}"
        raise InputError(what, where=content.path, fix=f"add --kind {able[0]} or another")
    fix = f"known are {', '.join(readers)}; a table needs a column model; some of VLMEvalKit's need --kind vlmevalkit"
    raise InputError("this is no result file of a known kind", where=content.path, fix=fix)


def _chosen(part: Imported, args: Args) -> Imported:
    """The rows that --only names, else those that stand for their dataset."""
    from dataclasses import replace

    from probes.imports import vlmevalkit

    names = part.frame["benchmark"].astype(str)
    if args.only:
        keep = names.map(lambda name: any(fnmatchcase(name, pattern) for pattern in args.only))
    elif part.evaluator == vlmevalkit.NAME:
        keep = names.isin(vlmevalkit.primary(list(names)))
    else:
        return part
    left = tuple(f"score {name}" for name in dict.fromkeys(names[~keep]))
    return replace(part, frame=part.frame[keep], left_out=(*part.left_out, *left))


def _write(table: Table, args: Args) -> str:
    """Write the table whole or not at all; one that is there is not lost."""
    target = args.table.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.suffix == ".parquet":
            table.frame.to_parquet(temporary, index=False)
        else:
            table.frame.to_csv(temporary, index=False)
        same = target.is_file() and target.read_bytes() == temporary.read_bytes()
        if same:
            return "unchanged"
        if target.exists() and target not in [source.resolve() for source in args.sources]:
            fix = "name it among the files to add to it, give another --out, or remove it"
            raise InputError("this table is there already and holds something else", where=args.table, fix=fix)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
        return "written"
    finally:
        temporary.unlink(missing_ok=True)


# --- what people read -------------------------------------------------------------------------------------


def _print(table: Table, parts: list[Imported], args: Args, state: str) -> None:
    from probes.imports.rows import listing
    from probes.verbs.shared import show

    for part in parts:
        print(f"{part.path}: {part.evaluator}, {_many(len(part.frame), part.rows)}")
        for note in part.notes:
            print(f"  {note}")
        if part.left_out:
            print(f"  left out: {listing(part.left_out)}")
    for note in table.notes:
        print(note)
    if table.duplicates:
        print(f"{_many(table.duplicates, table.rows)} said what another row says, merged")
    print()
    print(show(_summary(table), 3))
    if unknown := table.unknown():
        rows = len(table.frame)
        print(
            "\nunknown: " + ", ".join(name if k == rows else f"{name} ({k} of {rows})" for name, k in unknown.items())
        )
    print(f"\n{args.table}: {_many(len(table.frame), table.rows)}, {state}")


def _summary(table: Table):
    from vlm4vla_core.results import success_table

    if table.rows == "episodes":
        rates = success_table(table.frame, ["model", "benchmark"])
        if table.frame["chain"].notna().any():
            rates["mean_chain"] = table.frame.groupby(["model", "benchmark"], sort=False)["chain"].mean().to_numpy()
        return rates
    if table.rows == "performance":
        totals = table.frame[table.frame["task"] == ""]
        totals = totals if len(totals) else table.frame
        return totals[["model", "benchmark", "metric", "value", "successes", "episodes"]]
    return table.frame[["model", "benchmark", "score", "stderr", "n", "evaluator"]]


def _many(count: int, rows: str) -> str:
    noun = {"episodes": "episode", "performance": "performance row", "capability": "score"}[rows]
    return f"{count} {noun}{'s' * (count != 1)}"


def _report(path: Path, table: Table, parts: list[Imported], args: Args) -> None:
    from probes.verbs.shared import write_result

    write_result(
        path,
        "import",
        config={"kind": args.kind, "rows": table.rows, "only": list(args.only), "model": args.model,
                "family": args.family, "lineage": args.lineage, "benchmark": args.benchmark, "unit": args.unit,
                "run_id": args.run_id},
        inputs={str(part.path): folders.file_fingerprint(part.path) for part in parts},
        table=str(args.table),
        written=len(table.frame),
        duplicates=table.duplicates,
        unknown=table.unknown(),
        notes=list(table.notes),
        files=[
            {"path": str(part.path), "evaluator": part.evaluator, "rows": part.rows, "count": len(part.frame),
             "left_out": list(part.left_out), "notes": list(part.notes)}
            for part in parts
        ],
    )  # fmt: skip
