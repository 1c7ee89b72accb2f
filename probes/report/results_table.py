"""A results table for a paper: a row per policy, a column per benchmark, each value with its interval, and footnotes.

    table = results_table(rows)              # episode rows; `study_rows(study)` makes them of a study
    print(table.latex())                     # or .markdown(), .html()

With several training seeds the value is the mean over them and the interval is Student's over seeds; with one it is the
episodes' (Wilson; chains and shares of goals: BCa bootstrap). Every footnote is computed from the rows.

Trap: a column is one protocol with one number of actions carried out at a time and one set of tasks; rows that differ
in that get columns of their own, since their values are not comparable. Baselines look at every step as they please.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from probes.numbers import plain
from probes.report.views.benchmark_results import withheld
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims import coverage

if TYPE_CHECKING:
    import pandas as pd

    from probes.report.views.study import StudyTables

Format = Literal["markdown", "latex", "html"]
_BASELINES = ("random", "zero", "mean-action", "scripted")


@dataclass(frozen=True)
class ResultsTable:
    """head: column titles, the first of the policies. rows: cells as text. notes: footnotes, marked a, b, … where a
    column title or cell ends in `^a`."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def write(self, form: Format) -> str:
        return {"markdown": self.markdown, "latex": self.latex, "html": self.html}[form]()

    def markdown(self) -> str:
        """A pipe table, notes below."""
        lines = [_piped(self.head), _piped(("---", *["---:"] * (len(self.head) - 1))), *map(_piped, self.rows), ""]
        return "\n".join(lines + [f"<sup>{_letter(i)}</sup> {note}  " for i, note in enumerate(self.notes)]) + "\n"

    def latex(self) -> str:
        """A booktabs table with its notes; \\usepackage{booktabs} is all it needs."""
        columns = "l" + "r" * (len(self.head) - 1)
        lines = [
            "% \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
        ]
        lines += [" & ".join(map(_tex, self.head)) + " \\\\", "\\midrule"]
        lines += [" & ".join(map(_tex, row)) + " \\\\" for row in self.rows]
        lines += ["\\bottomrule", "\\end{tabular}", "", "\\smallskip", "\\begin{minipage}{\\linewidth}\\footnotesize"]
        lines += [f"\\textsuperscript{{{_letter(i)}}} {_tex(note)}\\\\" for i, note in enumerate(self.notes)]
        return "\n".join([*lines, "\\end{minipage}", "\\end{table}"]) + "\n"

    def html(self) -> str:
        """A table element with its notes as a list."""
        head = "".join(f"<th scope=col>{_hyper(cell)}</th>" for cell in self.head)
        rows = [
            f"<tr><th scope=row>{_hyper(row[0])}</th>"
            + "".join(f"<td>{_hyper(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        ]
        body = "\n".join(rows)
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return (
            f'<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n<ol type="a">{notes}</ol>\n'
        )


def results_table(rows: pd.DataFrame, *, level: float = 0.95) -> ResultsTable:
    """The table of episode rows with the columns `policy` and `seed` beside the usual ones.

    Raises InputError when there are no rows.
    """
    if rows.empty:
        raise InputError(
            "no episodes to make a table of", fix="run some first, `vlm4vla study run` or `vlm4vla evaluate`"
        )
    keyed = rows.assign(execute=_executed(rows))
    keyed = keyed.assign(_tasks=_task_sets(keyed))
    columns = list(keyed.groupby(["protocol", "execute", "_tasks"], sort=False, dropna=False))
    policies = list(dict.fromkeys(keyed["policy"]))
    notes: list[str] = []
    head, cells = ["policy"], {policy: [policy] for policy in policies}
    for _, column in columns:
        head.append(f"{column['protocol'].iloc[0]}^{_letter(len(notes))}")
        notes.append(_protocol_note(column))
        for policy in policies:
            cells[policy].append(_cell(column[column["policy"] == policy], level))
    notes.append(
        f"{100 * level:g} % intervals: of several training seeds Student's over the seeds (their number behind the "
        "value); of one, Wilson's over its episodes (chains and shares of goals: BCa bootstrap over initial states), "
        "which says nothing about another training."
    )
    head[0] = f"policy^{_letter(len(columns))}"
    if "scripted" in policies:
        cells["scripted"][0] += f"^{_letter(len(notes))}"
        notes.append("Reads the simulator's state; bounds what the demonstrations can teach.")
    return ResultsTable(tuple(head), tuple(tuple(cells[policy]) for policy in policies), tuple(notes))


def study_rows(study: StudyTables) -> pd.DataFrame:
    """A study's episodes with the names that its table shows; baselines by their own."""
    if study.episodes.empty:
        return study.episodes
    titles = {name: arm["title"] for name, arm in study.arms.items()}
    several = study.episodes.loc[study.episodes["arm"] != "baseline", "backbone"].nunique() > 1
    names = [
        backbone if arm == "baseline" else titles.get(arm, arm) + (f", {backbone}" if several else "")
        for arm, backbone in zip(study.episodes["arm"], study.episodes["backbone"], strict=True)
    ]
    return study.episodes.assign(policy=names, seed=study.episodes["cell_seed"])


def plain_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Episode rows of `vlm4vla evaluate` with a policy's name from what tells it apart but its seed."""

    def name(row: Any) -> str:
        words = [str(row["model"]), *filter(None, [row["withheld"]])]
        words += [f"step {row['step']:g}"] if several and row["step"] == row["step"] and row["step"] is not None else []
        words += ["from scratch"] if row["init"] == "scratch" and not str(row["model"]).startswith("tiny") else []
        words += [f"{row['freeze']} frozen"] if row["freeze"] not in (None, "none", "") else []
        words += [f"after {row['aux']}"] if row["aux"] not in (None, "none", "") else []
        words += [f"draw {row['draw']:g}"] if row.get("draw") is not None else []
        return ", ".join(words)

    kept = withheld(rows["note"]) if "note" in rows else ""
    clean = rows.assign(withheld=kept).astype(object).where(rows.notna(), None)
    several = clean.groupby("model")["step"].nunique().max() > 1
    return clean.assign(policy=[name(row) for _, row in clean.iterrows()], seed=clean["train_seed"])


def _executed(rows: pd.DataFrame) -> list[Any]:
    """Actions carried out at a time; of a baseline, which plans none, those of the policies that it stands beside."""
    learned = rows[~rows["policy"].isin(_BASELINES)]
    common = {protocol: part["execute"].iloc[0] for protocol, part in learned.groupby("protocol")}
    return [
        common.get(protocol, execute) if policy in _BASELINES else execute
        for policy, protocol, execute in zip(rows["policy"], rows["protocol"], rows["execute"], strict=True)
    ]


def _task_sets(rows: pd.DataFrame) -> list[str]:
    """Of every row, which tasks its policy ran of its protocol."""
    keys = ["policy", "protocol", "execute"]
    ran = rows.groupby(keys, dropna=False)["task"].transform(lambda tasks: " ".join(sorted(set(map(str, tasks)))))
    return [str(tasks) for tasks in ran]


def _measure(rows: pd.DataFrame) -> tuple[str, str, float]:
    """(column, what it is called, scale) of the headline number of these rows."""
    if rows["chain"].notna().all():
        return "chain", "mean number of tasks done in a row", 1.0
    if rows["partial"].notna().all():
        return "partial", "share of the goals reached, %", 100.0
    return "success", "success rate, %", 100.0


def _cell(rows: pd.DataFrame, level: float) -> str:
    """`48.0 [38.5, 57.7]`, and the number of seeds where there are several."""
    import numpy as np
    from scipy.stats import t

    from probes.differences import bootstrap
    from vlm4vla_core.results import wilson

    if rows.empty:
        return "–"
    column, _, scale = _measure(rows)
    values = rows[column].astype(float)
    digits = 2 if scale == 1 else 1
    seeds = values.groupby(rows["seed"].astype(str)).mean().to_numpy()
    if len(seeds) > 1:
        half = float(t.ppf(0.5 + level / 2, len(seeds) - 1) * seeds.std(ddof=1) / np.sqrt(len(seeds)))
        middle = float(seeds.mean())
        top = 1.0 if scale == 100 else 5.0
        span: tuple[float, float] | None = max(0.0, middle - half), min(top, middle + half)
    else:
        middle = float(values.mean())
        counts = column == "success"
        tasks = [part.to_numpy(float) for _, part in values.groupby(rows["task"].astype(str))]
        found = wilson(int(values.sum()), len(values), level) if counts else bootstrap(tasks, level)
        span = tuple(found) if found is not None else None  # type: ignore[assignment]
    told = plain(scale * middle, digits)
    told += f" [{plain(scale * span[0], digits)}, {plain(scale * span[1], digits)}]" if span else " [–]"
    return told + (f" ({len(seeds)})" if len(seeds) > 1 else "")


def _protocol_note(rows: pd.DataFrame) -> str:
    """What a column's numbers are numbers of."""
    protocol = str(rows["protocol"].iloc[0])
    _, words, _ = _measure(rows)
    each = sorted({len(part) for _, part in rows.groupby(["policy", rows["seed"].astype(str)], dropna=False)})
    episodes = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
    rules = " and ".join(sorted({str(rule).replace("_", " ") for rule in rows["success_rule"]}))
    execute = rows["execute"].iloc[0]
    carried = "baselines' own" if execute is None or execute != execute else f"{execute:g}"
    text = (
        f"{protocol}, {coverage(protocol, rows['task'])}: {words}; {episodes} episodes per policy and seed, "
        f"{_states(rows)}; success at {rules}; actions carried out before the policy looks again: {carried}."
    )
    if protocol.startswith("tabletop"):
        text += " The project's own built-in world, none of the published benchmarks."
    if "provenance" in rows and "shipped" in set(rows["provenance"]):
        text += " Rows that ship with the project are among them."
    return text


def _states(rows: pd.DataFrame) -> str:
    """Whether all policies started from the same states."""
    runs = rows.groupby(["policy", rows["seed"].astype(str)], dropna=False)
    sets = {frozenset(zip(part["task"], part["env_seed"], strict=True)) for _, part in runs}
    return "the same initial states for all" if len(sets) == 1 else "not all of them from the same initial states"


# --- three ways to write it -------------------------------------------------------------------------------------------


def _letter(place: int) -> str:
    return chr(ord("a") + place)


def _split(cell: str) -> tuple[str, str]:
    """(text, footnote mark) of a cell that may end in `^a`."""
    text, mark, letter = cell.rpartition("^")
    return (text, letter) if mark and len(letter) == 1 else (cell, "")


def _piped(cells: tuple[str, ...]) -> str:
    shown = []
    for cell in cells:
        text, mark = _split(cell)
        shown.append(text.replace("|", "\\|") + (f"<sup>{mark}</sup>" if mark else ""))
    return "| " + " | ".join(shown) + " |"


_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip


def _tex(cell: str) -> str:
    text, mark = _split(cell)
    return "".join(_SPECIAL.get(one, one) for one in text) + (f"\\textsuperscript{{{mark}}}" if mark else "")


def _hyper(cell: str) -> str:
    text, mark = _split(cell)
    return escape(text) + (f"<sup>{mark}</sup>" if mark else "")
