"""VLMEvalKit: `status.json` of a run, the score tables `*_acc.csv`, `*_score.json`, and judged answers `*_result.tsv`.

Followed: 0.2rc1, commit e8e78f05 of August 2026 (`smp/status_report.py`, `smp/file.py`,
`dataset/utils/multiple_choice.py`), checked against files that these functions wrote. Only `status.json` names model,
dataset, commit and judge; the other files name neither, so both come from the layout
`MODEL/[RUN/]MODEL_DATASET_acc.csv` or from --model and --benchmark. Scores are called DATASET/METRIC with the kit's own
flattening (`split=dev|Overall`; the split "none" is left out), so the same score from two files is one score. Rows with
"overall" in the name are taken, where there are any; the others are listed and taken with --only.

Judged answers (column `hit`) give n and a standard error, which no score table states. The kit writes multiple-choice
scores as fractions and most others in per cent and says so nowhere: the unit stays "unknown". Trap: its .pkl files
are pickles and never read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from probes.imports.rows import RECORD, UNKNOWN, Content, Imported, Labels, blank, imported, is_number, listing, number
from vlm4vla_core.errors import InputError

NAME = "vlmevalkit"
_RUN = re.compile(r"^T\d{8}(-\d{6}|_G[0-9a-fA-F]+)$")
# What follows the dataset in a file's name; a judge's name is part of it.
_SUFFIX = re.compile(r"(_(exact_matching|openai|(chat)?gpt[^_]*))?_(acc|score|rating|metrics|results?)$")


def recognises(content: Content) -> bool:
    if content.form == "table":
        names = {name.lower() for name in content.value.columns}
        first = {str(cell).strip().lower() for cell in content.value.iloc[:, 0]}
        total = "overall" in first or any("overall" in name for name in names)
        return ({"hit", "prediction"} <= names) or (total and "score" not in names)
    if content.form != "json":
        return False
    body = content.value
    if isinstance(body, dict) and isinstance(body.get("datasets"), dict):
        return "schema_version" in body or "eval_id" in body
    return any("overall" in name.lower() for name, _ in _flat(body)) and not _looks_foreign(body)


def _looks_foreign(body: Any) -> bool:
    return isinstance(body, dict) and bool({"tasks", "results", "overall", "aggregated", "per_task"} & set(body))


def read(content: Content, labels: Labels) -> Imported:
    """Capability rows. Raises InputError when model or dataset cannot be told, or when a score is no number."""
    if content.form == "json" and isinstance(content.value, dict) and isinstance(content.value.get("datasets"), dict):
        return _status(content, labels)
    if content.form not in ("table", "json"):
        raise InputError("no score table of VLMEvalKit", where=content.path)
    model, dataset = _place(content, labels)
    if content.form == "table" and {"hit", "prediction"} <= {name.lower() for name in content.value.columns}:
        scores: list[tuple[str, float, float | None, int | None]] = list(_hits(content))
    else:
        flat = _rows(content.value) if content.form == "table" else _flat(content.value)
        # An empty category has the mean NaN; a whole dataset must not.
        kept = [(name, value) for name, value in flat if not blank(value) or "overall" in name.lower()]
        scores = [(name, number(value, f"{content.path}, {name}", name), None, None) for name, value in kept]
    if not scores:
        raise InputError("the table holds no scores", where=content.path)
    base = {"version": UNKNOWN, "prompt": UNKNOWN}
    return _finish(content, labels, [(model, dataset, *score, base) for score in scores])


# --- status.json ------------------------------------------------------------------------------------------


def _status(content: Content, labels: Labels) -> Imported:
    body = content.value
    model = labels.model or str(body.get("model_name") or "") or labels.need_model(content.path)
    scores: list[tuple[Any, ...]] = []
    notes = []
    for dataset, entry in body["datasets"].items():
        metrics = entry.get("metrics") if isinstance(entry, dict) else None
        if not isinstance(metrics, dict) or not metrics:
            state = entry.get("error_message") or entry.get("status") if isinstance(entry, dict) else None
            notes.append(f"{dataset}: no scores ({state or UNKNOWN})")
            continue
        judge = entry.get("judge_model")
        base = {
            "version": f"commit {body['commit']}" if body.get("commit") else UNKNOWN,
            "prompt": f"judge {judge}" if judge else UNKNOWN,
        }
        for name, value in metrics.items():
            shown = _short(name)
            scores.append(
                (model, dataset, shown, number(value, f"{content.path}, {dataset}/{shown}", shown), None, None, base)
            )
    if not scores:
        raise InputError(f"no dataset of this run has scores ({listing(notes)})", where=content.path)
    return _finish(content, labels, scores, notes)


def _short(name: str) -> str:
    return "|".join(part for part in str(name).split("|") if part != "split=none")


def _finish(
    content: Content, labels: Labels, scores: list[tuple[Any, ...]], notes: list[str] | None = None
) -> Imported:
    rows = []
    for model, dataset, name, score, stderr, n, base in scores:
        rows.append({
            "model": model, "family": labels.family or None, "lineage": labels.lineage or None,
            "benchmark": f"{dataset}/{name}", "score": score, "stderr": stderr, "n": n, "evaluator": NAME, **base,
            "source": content.path.name, "quality": "measured", "unit": labels.unit or UNKNOWN,
            RECORD: f"{content.path}, {dataset}/{name}",
        })  # fmt: skip
    says = str(content.value.get("model_name") or "") if isinstance(content.value, dict) else ""
    return imported(content, NAME, "capability", rows, notes=notes or [], says=says)


def primary(benchmarks: list[str]) -> set[str]:
    """Of one file's DATASET/METRIC names those that stand for a dataset: "overall" in the metric (and of these the
    accuracies, where counts stand beside them), else all of it."""
    by_dataset: dict[str, list[str]] = {}
    for name in benchmarks:
        by_dataset.setdefault(name.split("/", 1)[0], []).append(name)
    chosen: set[str] = set()
    for names in by_dataset.values():
        overall = {name for name in names if "overall" in name.split("/", 1)[1].lower()} or set(names)
        chosen |= {name for name in overall if name.lower().endswith("|acc")} or overall
    return chosen


# --- score tables and judged answers ----------------------------------------------------------------------


def _place(content: Content, labels: Labels) -> tuple[str, str]:
    """(model, dataset), stated or from the folder and file names that VLMEvalKit gives its results."""
    folder = content.path.resolve().parent
    owner = folder.parent.name if _RUN.match(folder.name) else folder.name
    stem = content.path.stem
    model = labels.model or (owner if owner and stem.startswith(f"{owner}_") else "")
    rest = stem.removeprefix(f"{owner}_") if stem.startswith(f"{owner}_") else stem.removeprefix(f"{labels.model}_")
    dataset = labels.benchmark
    if not dataset and rest != stem:
        dataset = _SUFFIX.sub("", rest)
    if not model:
        labels.need_model(content.path, " (VLMEvalKit says it in MODEL/MODEL_DATASET_acc.csv)")
    if not dataset:
        what = "the file does not say which dataset it is about (VLMEvalKit says it in MODEL/MODEL_DATASET_acc.csv)"
        raise InputError(what, where=content.path, fix="add --benchmark NAME")
    return model, dataset


def _rows(frame: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of a table: text columns name the row, numeric ones the score."""
    numeric = [name for name in frame.columns if any(_numeric(value) for value in frame[name])]
    for _, row in frame.iterrows():
        kinds = [
            f"{name}={str(row[name]).strip()}" for name in frame.columns if name not in numeric and not blank(row[name])
        ]
        for name in numeric:
            yield _short("|".join([*kinds, name])), row[name]


def _numeric(value: Any) -> bool:
    try:
        return math.isfinite(float(str(value).strip().removesuffix("%")))
    except ValueError:
        return False


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of nested JSON; a list of records is a table."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(one, f"{prefix}|{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        for one in value:
            kinds = [f"{key}={text}" for key, text in one.items() if isinstance(text, str) and not _numeric(text)]
            for key, number_ in one.items():
                if is_number(number_) or (isinstance(number_, str) and _numeric(number_)):
                    yield _short("|".join([*([prefix] if prefix else []), *kinds, str(key)])), number_
    elif isinstance(value, list) and len(value) == 1:
        yield from _flat(value[0], prefix)
    elif is_number(value) or (isinstance(value, str) and _numeric(value)):
        yield _short(prefix or "value"), value


def _hits(content: Content) -> Iterator[tuple[str, float, float | None, int]]:
    """Mean of `hit` by split with sd / sqrt(n) (n - 1 in the sd)."""
    frame = content.value.rename(columns=str.lower)
    splits = frame["split"].astype(str).str.strip() if "split" in frame else None
    for split in ("",) if splits is None else tuple(dict.fromkeys(splits)):
        hits = frame["hit"] if splits is None else frame["hit"][splits == split]
        values = [
            number(hit, f"{content.path}, row {place}", "hit") for place, hit in zip(hits.index + 2, hits, strict=True)
        ]
        n, mean = len(values), math.fsum(values) / len(values)
        stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
        yield (f"split={split}|Overall" if split not in ("", "none") else "Overall"), mean, stderr, n
