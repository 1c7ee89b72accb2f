"""lmms-eval: its `*_results.json`, and its `*_samples_TASK.jsonl`, one capability row per task and metric.

Followed: 0.7.3 (`loggers/evaluation_tracker.py`, `evaluator.py`), whose keys `results`, `configs`, `versions`,
`n-shot`, `n-samples` and `METRIC,FILTER` are those of 0.3.0 too; 0.3.0 writes no version of itself. A row is called
TASK/METRIC. Its prompt column holds what the task's configuration says about prompts, shots and chat template. Checked
against results and samples that 0.7.3's own tracker wrote.

lmms-eval does not state a metric's unit: `mmmu_acc` is a fraction, MME's scores run to thousands, so the unit stays
"unknown". Trap: `_stderr_clt` and `_stderr_clustered` are errors of the samples' mean, which some tasks then scale;
they are taken only where score and error can both be those of a fraction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from probes.imports.rows import RECORD, UNKNOWN, Content, Imported, Labels, imported, is_number, listing, number
from vlm4vla_core.errors import InputError

NAME = "lmms-eval"
_MARKS = {"lmms_eval_version", "lmms_eval_specific_kwargs", "process_docs_parallel", "doc_to_visual"}
_STABILITY = ("_expected_accuracy", "_consensus_accuracy", "_internal_variance", "_consistency_rate")
_SAMPLE_KEYS = {"doc_id", "doc_hash", "target", "filtered_resps"}


def recognises(content: Content) -> bool:
    if content.form == "jsonl" or (content.form == "json" and _is_sample(content.value)):
        lines = content.value if content.form == "jsonl" else [content.value]
        return all(_is_sample(line) for line in lines[:20])
    body = content.value
    if content.form != "json" or not isinstance(body, dict) or not isinstance(body.get("results"), dict):
        return False
    return bool({"configs", "versions", "n-samples"} & set(body))


def _is_sample(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and {"doc_id", "target"} <= set(line)
        and bool(_SAMPLE_KEYS - {"doc_id", "target"} & set(line))
    )


def read(content: Content, labels: Labels) -> Imported:
    """Capability rows. Raises InputError for scores that are no numbers, and when nothing says which model it was."""
    if content.form == "jsonl" or _is_sample(content.value):
        return _samples(content, labels)
    return _results(content, labels)


# --- results ----------------------------------------------------------------------------------------------


def _results(content: Content, labels: Labels) -> Imported:
    body = content.value
    if not isinstance(body, dict) or not isinstance(body.get("results"), dict):
        raise InputError("no results of lmms-eval: it has no table 'results'", where=content.path)
    model = labels.model or model_name(body)
    if not model:
        adapter = _config(body).get("model")
        labels.need_model(content.path, f" (only its adapter, {adapter})" if adapter else "")
    rows, left_out = [], []
    for task, metrics in body["results"].items():
        if not isinstance(metrics, dict):
            raise InputError("a task's results are no table", where=f"{content.path}, {task}")
        for key, value in metrics.items():
            metric, comma, rule = key.partition(",")
            if not comma or "_stderr" in metric or value == " ":
                continue
            if metric.endswith(_STABILITY) or not is_number(
                value
            ):  # a task that only writes a submission has no number
                left_out.append(f"{task}/{metric}")
                continue
            where = f"{content.path}, {task}/{metric}"
            score = number(value, where, metric)
            count, of = _samples_of(body, task, metrics)
            lower = _table(_table(body, "higher_is_better"), task).get(metric) is False
            rows.append({
                "model": model, "family": labels.family or None, "lineage": labels.lineage or None,
                "benchmark": labels.benchmark or _name(task, metric, rule), "score": score,
                "stderr": _stderr(metrics, metric, rule, score, count), "n": count, "evaluator": _evaluator(body),
                "version": _version(body, task), "source": content.path.name,
                "quality": f"measured on {count} of {of} questions" if count and of and count < of else "measured",
                "unit": f"{labels.unit or UNKNOWN}, lower is better" if lower else labels.unit or UNKNOWN,
                "prompt": _prompt(body, task), RECORD: where,
            })  # fmt: skip
    return imported(content, NAME, "capability", rows, left_out=left_out, says=model_name(body))


def _name(task: str, metric: str, rule: str) -> str:
    return f"{task}/{metric}" if rule in ("none", "") else f"{task}/{metric} ({rule})"


def model_name(body: Mapping[str, Any]) -> str:
    """The checkpoint: `model_name`, else what the model arguments load; empty when neither says it."""
    if isinstance(body.get("model_name"), str) and body["model_name"]:
        return str(body["model_name"])
    arguments = _config(body).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    if not isinstance(arguments, dict):
        return ""
    keys = ("peft", "pretrained", "model", "model_version", "model_name", "model_id", "path")
    return next((str(arguments[key]) for key in keys if arguments.get(key)), "")


def _table(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = body.get(key)
    return value if isinstance(value, dict) else {}


def _config(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return _table(body, "config")


def _samples_of(body: Mapping[str, Any], task: str, metrics: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(questions answered, questions of the task); None where the file does not say."""
    counts = _table(_table(body, "n-samples"), task)
    answered = counts.get("effective", metrics.get("samples"))
    # A limit is there, but 0.3.0's and 0.7.3's count ignores it when the limit is a fraction.
    limit = _config(body).get("limit")
    if (is_number(limit) and 0 < limit < 1) or not is_number(answered):
        answered = metrics.get("samples")
    of = counts.get("original")
    return (int(answered) if is_number(answered) else None, int(of) if is_number(of) else None)


def _stderr(metrics: Mapping[str, Any], metric: str, rule: str, score: float, count: int | None) -> float | None:
    bootstrap = metrics.get(f"{metric}_stderr,{rule}")
    if is_number(bootstrap) and math.isfinite(bootstrap):
        return float(bootstrap)
    for kind in ("_stderr_clustered", "_stderr_clt"):
        found = metrics.get(f"{metric}{kind},{rule}")
        if is_number(found) and math.isfinite(found) and 0 <= score <= 1 and found <= 0.5:
            if kind == "_stderr_clt" and count and count > 1 and found > 0.5001 / math.sqrt(count - 1):
                continue  # more than any fraction's mean can have: the samples were on another scale
            return float(found)
    return None


def _evaluator(body: Mapping[str, Any]) -> str:
    """lmms-eval, or the format's ancestor when no mark of lmms-eval is in the file."""
    configs = _table(body, "configs").values()
    marked = _MARKS & (
        set(body) | set(_config(body)) | {key for one in configs if isinstance(one, dict) for key in one}
    )
    return NAME if marked else f"{NAME} or lm-evaluation-harness"


def _version(body: Mapping[str, Any], task: str) -> str:
    own = body.get("lmms_eval_version") or body.get("lm_eval_version")
    if not own or "unknown" in str(own):
        own = f"commit {body['git_hash']}" if body.get("git_hash") else UNKNOWN
    return f"{own}; task {_table(body, 'versions').get(task) or UNKNOWN}"


def _prompt(body: Mapping[str, Any], task: str) -> str:
    config = _table(_table(body, "configs"), task)
    specific = config.get("lmms_eval_specific_kwargs")
    parts: dict[str, Any] = {}
    if isinstance(specific, dict):
        kwargs = specific["default"] if isinstance(specific.get("default"), dict) else specific
        parts |= {key: kwargs[key] for key in ("pre_prompt", "post_prompt") if kwargs.get(key)}
    parts |= {key: body[key] for key in ("system_instruction", "chat_template_sha") if body.get(key)}
    shots = _table(body, "n-shot").get(task)
    if is_number(shots):
        parts["shots"] = shots
    return json.dumps(parts, ensure_ascii=False) if parts else UNKNOWN


# --- samples ----------------------------------------------------------------------------------------------


def _samples(content: Content, labels: Labels) -> Imported:
    """Means and standard errors of what each answered question scored: sd / sqrt(n) with n - 1 in the sd."""
    lines = content.value if content.form == "jsonl" else [content.value]
    if bad := [place for place, line in enumerate(lines, 1) if not isinstance(line, dict)]:
        raise InputError(f"line {bad[0]} is no record", where=content.path)
    body, task = _beside(content.path)
    model = labels.model or model_name(body)
    if not model:
        labels.need_model(content.path, " (samples name no model, and no results file lies beside them)")
    if not labels.benchmark and not task:
        fix = "add --benchmark NAME, or keep the file's name DATE_samples_TASK.jsonl"
        raise InputError("samples do not say which task they are of", where=content.path, fix=fix)
    rows = []
    scored = dict(_scored(lines, content.path))
    for metric, values in scored.items():
        n, mean = len(values), math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
        rows.append({
            "model": model, "family": labels.family or None, "lineage": labels.lineage or None,
            "benchmark": labels.benchmark or f"{task}/{metric}", "score": mean, "stderr": spread, "n": n,
            "evaluator": _evaluator(body) if body else NAME, "version": _version(body, task) if body else UNKNOWN,
            "source": content.path.name, "quality": "mean of the samples", "unit": labels.unit or UNKNOWN,
            "prompt": _prompt(body, task) if body else UNKNOWN, RECORD: f"{content.path}, {metric}",
        })  # fmt: skip
    if not rows:
        what = f"no metric of these samples is a plain number ({listing(_metrics(lines))})"
        raise InputError(what, where=content.path, fix="give the results file instead")
    left_out = [f"{metric}, no number in every sample" for metric in _metrics(lines) if metric not in scored]
    return imported(content, NAME, "capability", rows, left_out=left_out, says=model_name(body))


_ABOUT = {"doc_id", "doc_hash", "target", "input", "resps", "filtered_resps", "arguments", "doc", "token_counts",
          "input_media"}  # fmt: skip


def _metrics(lines: list[dict[str, Any]]) -> list[str]:
    return [key for key in dict.fromkeys(key for line in lines for key in line) if key not in _ABOUT]


def _scored(lines: list[dict[str, Any]], path: Path) -> Iterator[tuple[str, list[float]]]:
    for metric in _metrics(lines):
        values = [line.get(metric) for line in lines]
        values = [value.get("score") if isinstance(value, dict) else value for value in values]
        if all(isinstance(value, bool) or is_number(value) for value in values):
            scores = [value if is_number(value) else float(bool(value)) for value in values]
            yield metric, [number(value, f"{path}, question {i}", metric) for i, value in enumerate(scores)]


def _beside(path: Path) -> tuple[Mapping[str, Any], str]:
    """(the results of the same run, where they lie beside; the task): DATE_samples_TASK.jsonl, DATE_results.json."""
    date, middle, task = path.stem.partition("_samples_")
    results = path.with_name(f"{date}_results.json")
    if not middle:
        return {}, ""
    try:
        body = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    except (OSError, ValueError):
        body = {}
    return (body if isinstance(body, dict) else {}), task
