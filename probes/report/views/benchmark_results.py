"""Success rates of several policies on one benchmark, side by side: the view of `benchmark_results`.

    rows = episode_rows(folders)                 # one row per episode, as `vlm4vla evaluate` writes them
    table = success(rows, level=0.95)            # one row per policy, Wilson intervals and n
    overall_figure(table); task_figure(rows); answer(table, rows)

Trap: rows of different protocols are never pooled, and an episode that stands in two files would count twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from probes.differences import newcombe, welch
from probes.numbers import signed
from vlm4vla_core.errors import InputError
from vlm4vla_core.evaluation import chain_summary
from vlm4vla_core.results import EPISODE_COLUMNS, read_table, success_table
from vlm4vla_core.sims import coverage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLIND = ("zero", "random", "mean-action")  # baselines that never look at a picture
SCRIPTED = "scripted"  # reads the simulator's state
_KEY = ["run_id", "model", "step", "execute", "withheld", "draw"]  # what makes two rows rows of one policy


def episode_rows(paths: Iterable[Path]) -> pd.DataFrame:
    """All episode rows of files (parquet, CSV) and folders of `vlm4vla evaluate`, with a readable `policy` column.

    Raises InputError for a missing column, a success that is neither true nor false, an episode that stands twice,
    and rows of more than one protocol.
    """
    import pandas as pd

    frames = []
    for path in paths:
        frame = read_table(path / "rows.parquet" if path.is_dir() else path, required=EPISODE_COLUMNS)
        if not frame["success"].isin([0, 1]).all():
            raise InputError("success is neither true nor false in some episode", where=path)
        frames.append(frame.astype(object))
    if not frames:
        raise InputError("no files of episode rows", fix="make them with `vlm4vla evaluate`")
    rows = pd.concat(frames, ignore_index=True)
    rows = rows.assign(withheld=withheld(rows["note"]), draw=rows.get("draw"))
    protocols = list(dict.fromkeys(rows["protocol"]))
    if len(protocols) > 1:
        raise InputError(f"rows of {len(protocols)} protocols: {', '.join(protocols)}", fix="report one at a time")
    twice = rows[rows.duplicated([*_KEY, "task", "episode"])]
    if not twice.empty:
        first = twice.iloc[0]
        what = f"episode {first['episode']} of {first['task']} by {first['model']} stands more than once"
        raise InputError(what, fix="give each file of rows once")
    rows["success"] = rows["success"].astype(bool)
    rows["policy"] = _names(rows)
    rank = {name: i for i, name in enumerate([SCRIPTED, "", *reversed(BLIND)])}  # expert, learned policies, blind
    order = rows["model"].map(lambda model: rank.get(model, 1)) + 0.5 * (rows["withheld"] != "")
    steps = -pd.to_numeric(rows["step"]).fillna(-1)
    return rows.assign(_order=order, _step=steps).sort_values(["_order", "_step"], kind="stable").drop(
        columns=["_order", "_step"]).reset_index(drop=True)  # fmt: skip


def withheld(notes: pd.Series) -> pd.Series:
    """What a shortcut check kept from the policy, by the rows' notes: "without image", "without language" or ""."""
    return notes.astype(str).str.extract(r"\b(without (?:image|language))\b", expand=False).fillna("")


def _names(rows: pd.DataFrame) -> pd.Series:
    """The shortest names that tell the policies apart: the model, what it was not shown, then its step, its run, its
    execute length, its draw."""
    import pandas as pd

    policies = rows[_KEY].drop_duplicates().reset_index(drop=True)
    names = policies["model"].astype(str) + [f", {part}" if part else "" for part in policies["withheld"]]
    further = (("step", ", step {}"), ("run_id", ", {}"), ("execute", ", executing {}"), ("draw", ", draw {}"))
    for column, form in further:
        for name in names[names.duplicated()].unique():
            chosen = names == name
            if policies.loc[chosen, column].nunique(dropna=False) > 1:
                values = policies.loc[chosen, column]
                names[chosen] = [name + ("" if pd.isna(value) else form.format(value)) for value in values]
    return rows[_KEY].merge(policies.assign(policy=names), on=_KEY, how="left")["policy"].set_axis(rows.index)


def success(rows: pd.DataFrame, *, level: float = 0.95, by: tuple[str, ...] = ("policy",)) -> pd.DataFrame:
    """Success per policy (or by=("policy", "task")): episodes, successes, rate, low, high (Wilson), kind, execute.

    kind: `blind`, `untrained` (step 0 of a training), `learned`, `shortcut` (learned, kept from seeing or reading) or
    `expert`. Over several tasks the episodes are
    pooled, every task with its own n, so that rates are comparable only between policies that ran the same episodes.
    Where every episode is a chain of instructions, also chain: mean number done in a row (mean, low, high at 95 %),
    and the shares of chains with at least 1 … 5 done (rates).
    """
    table = success_table(rows, list(by), level)
    first = rows.drop_duplicates("policy").set_index("policy")
    kinds = {policy: _kind(row["model"], row["step"], row["withheld"]) for policy, row in first.iterrows()}
    table = table.assign(kind=table["policy"].map(kinds), execute=table["policy"].map(first["execute"]))
    if rows["chain"].isna().any():
        return table
    return table.assign(chain=[_chain(group["chain"]) for _, group in rows.groupby(list(by), sort=False)])


def _chain(lengths: pd.Series) -> dict[str, object]:
    told = chain_summary(lengths.to_numpy(int))
    low, high = told.interval
    return {"mean": told.mean, "low": low, "high": high, "rates": [step["rate"] for step in told.rates]}


def _kind(model: str, step: object, kept: str) -> str:
    if model in BLIND or model == SCRIPTED:
        return "expert" if model == SCRIPTED else "blind"
    if kept:
        return "shortcut"
    return "untrained" if step == 0 else "learned"


def readable(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """A success table as a reader wants it: per cent with its interval, and the counts."""
    import pandas as pd

    if "task" in table:
        order = {task: i for i, task in enumerate(table["task"].unique())}
        table = table.sort_values("task", key=lambda tasks: tasks.map(order), kind="stable", ignore_index=True)
    shown = ("task", "policy") if "task" in table else ("policy", "execute")
    columns: dict[str, object] = {name: table[name] for name in shown if name in table}
    columns["success, %"] = [f"{100 * rate:.1f}" for rate in table["rate"]]
    columns[f"{100 * level:g} % interval"] = [
        f"{100 * low:.1f} to {100 * high:.1f}" for low, high in zip(table["low"], table["high"], strict=True)
    ]
    if "chain" in table:
        columns["in a row, 95 %"] = [f"{c['mean']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in table["chain"]]
        columns["1 / 2 / 3 / 4 / 5 in a row, %"] = [
            " / ".join(f"{100 * rate:.0f}" for rate in c["rates"]) for c in table["chain"]
        ]
    columns["episodes"] = [f"{k} of {n}" for k, n in zip(table["successes"], table["episodes"], strict=True)]
    return pd.DataFrame(columns)


def protocol_words(rows: pd.DataFrame) -> str:
    """Protocol and success rule of these rows, for a caption."""
    protocol, part = rows["protocol"].iloc[0], _part(rows)
    rules = " and ".join(sorted({str(rule).replace("_", " ") for rule in rows["success_rule"]}))
    return (
        f"Protocol {protocol}, {part}; an episode is a success if the goal holds at {rules}. "
        "execute: actions carried out before the policy looks again."
    )


def _part(rows: pd.DataFrame) -> str:
    """How much of their protocol these rows are."""
    return coverage(rows["protocol"].iloc[0], rows["task"], rows["episode"].nunique())


# --- the sentence -----------------------------------------------------------------------------------------


def answer(table: pd.DataFrame, rows: pd.DataFrame, *, level: float = 0.95) -> str:
    """One sentence: the best learned policy beside the best blind baseline, told apart or undetermined."""
    learned, blind = (table[table["kind"] == kind] for kind in ("learned", "blind"))
    protocol = rows["protocol"].iloc[0]
    where = f"On {protocol} ({_part(rows)})"
    if learned.empty:
        best = _best(table)
        return f"{where} no trained policy was evaluated; the highest success rate is that of {_told(best, level)}."
    best = _best(learned)
    chosen = f" (the best of {len(learned)}, chosen on these very episodes)" if len(learned) > 1 else ""
    text = f"{where}, {_told(best, level, chosen)}"
    if blind.empty:
        return f"{text}; no baseline was evaluated beside it."
    other = _best(blind)
    if _episodes(rows, best["policy"]) != _episodes(rows, other["policy"]):
        return f"{text}; the best baseline without sight, {other['policy']}, ran other episodes and is not compared."
    low, high = newcombe(best["successes"], best["episodes"], other["successes"], other["episodes"], level)
    told = f"between {signed(100 * low, 1)} and {signed(100 * high, 1)} points"
    own, others = _lengths(rows, best["policy"]), _lengths(rows, other["policy"])
    if "chain" in best and (span := welch(own, others, level)):
        low, high = span
        told = f"between {signed(low)} and {signed(high)} instructions in a row"
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "undetermined against"
    return (
        f"{text}, {verdict} the best baseline without sight, {other['policy']} ({other['successes']} of "
        f"{other['episodes']}; the difference lies {told}).{_by_task(rows, best['policy'], list(blind['policy']))}"
        f"{_shortcuts(table)}"
    )


def _shortcuts(table: pd.DataFrame) -> str:
    """What policies did that were kept from seeing or reading: successes without either would be a shortcut."""
    checked = table[table["kind"] == "shortcut"]
    parts = [f"{row.policy} {row.successes} of {row.episodes}" for row in checked.itertuples()]
    return f" Shortcut checks: {'; '.join(parts)}." if parts else ""


def _best(table: pd.DataFrame) -> pd.Series:
    """The row of the longest chains, or of the highest success rate."""
    score = table["rate"] if "chain" not in table else table["chain"].map(lambda chain: chain["mean"])
    return table.loc[score.astype(float).idxmax()]


def _lengths(rows: pd.DataFrame, policy: str) -> list[float]:
    return rows.loc[rows["policy"] == policy, "chain"].astype(float).tolist()


def _by_task(rows: pd.DataFrame, policy: str, blind: list[str]) -> str:
    """The same task by task, against each task's own best baseline: a pooled rate may hide a task at its floor."""
    table = success(rows, by=("task", "policy"))
    parts = []
    for task, part in table.groupby("task", sort=False):
        own, others = part[part["policy"] == policy].iloc[0], part[part["policy"].isin(blind)]
        other = others.loc[others["rate"].astype(float).idxmax()]
        floor = f"{other['policy']}: {other['successes']} of {other['episodes']}"
        parts.append(f"{task} {own['successes']} of {own['episodes']} ({floor})")
    return f" By task, with the best baseline: {', '.join(parts)}." if len(parts) > 1 else ""


def _episodes(rows: pd.DataFrame, policy: str) -> set[tuple[object, object]]:
    """Which episodes of which tasks a policy ran: rates over different ones are not comparable."""
    own = rows[rows["policy"] == policy]
    return set(zip(own["task"], own["env_seed"], strict=True))


def _told(row: pd.Series, level: float, aside: str = "") -> str:
    return (
        f"{row['policy']}{aside} succeeds in {row['successes']} of {row['episodes']} episodes "
        f"({100 * row['rate']:.1f} %, {100 * level:g} % interval {100 * row['low']:.1f} to {100 * row['high']:.1f} %)"
        + (f", {row['chain']['mean']:.2f} of 5 instructions in a row" if "chain" in row else "")
    )


# --- figures ----------------------------------------------------------------------------------------------


def overall_figure(table: pd.DataFrame, *, title: str = "") -> Figure:
    """A forest plot: one line per policy, its success rate, its interval and its counts."""
    from probes.style import figure_style, new_figure

    with figure_style():
        fig, axes = new_figure(width=5.0, height=0.75 + 0.27 * len(table))
        _forest(axes[0, 0], table, labels=True)
        axes[0, 0].set_xlabel("chains with all five done" if "chain" in table else "success rate, all tasks")
        if title:
            axes[0, 0].set_title(title)
    return fig


def task_figure(table: pd.DataFrame, *, columns: int = 2) -> Figure:
    """One forest plot per task. table: of `success(rows, by=("policy", "task"))`."""
    from probes.style import ONE_COLUMN, figure_style, new_figure

    tasks = list(dict.fromkeys(table["task"]))
    columns = min(columns, len(tasks))
    lines = -(-len(tasks) // columns)
    policies = list(dict.fromkeys(table["policy"]))
    with figure_style():
        size = {"width": 5.6 if columns > 1 else ONE_COLUMN, "height": lines * (0.62 + 0.2 * len(policies))}
        fig, axes = new_figure(lines, columns, **size, sharex=True, sharey=True)
        for axis, task in zip(axes.flat, tasks, strict=False):
            part = table[table["task"] == task].set_index("policy").reindex(policies).reset_index()
            _forest(axis, part, labels=False)
            axis.set_title(str(task).replace("_", " "))
        for axis in list(axes.flat)[len(tasks) :]:
            axis.set_axis_off()
        for axis in list(axes.flat)[len(tasks) - columns : len(tasks)]:
            axis.set_xlabel("success rate")
            axis.tick_params(labelbottom=True)
    return fig


def _forest(axis: Axes, table: pd.DataFrame, *, labels: bool) -> None:
    from probes.style import INK, MUTED, PALETTE

    looks = {
        "blind": (MUTED, "s"),
        "untrained": (MUTED, "o"),
        "shortcut": (MUTED, "v"),
        "learned": (PALETTE[0], "o"),
        "expert": (PALETTE[2], "D"),
    }
    for y, row in enumerate(table.itertuples()):
        if row.rate != row.rate:  # this policy has no episodes of this task
            continue
        colour, marker = looks[row.kind]
        axis.plot([100 * row.low, 100 * row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axis.plot(100 * row.rate, y, marker, color=colour, markersize=5, clip_on=False)
        if labels:
            axis.annotate(f"{row.successes} of {row.episodes}", (1.03, y), xycoords=("axes fraction", "data"),
                          va="center", color=INK, annotation_clip=False)  # fmt: skip
    axis.set_yticks(range(len(table)), table["policy"])
    axis.set_ylim(len(table) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(0, 100)
    axis.spines["left"].set_visible(False)
    axis.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, pad=7)


def figure_words(table: pd.DataFrame) -> str:
    """What the overall figure shows, for readers who do not see it."""
    parts = [f"{row.policy} {100 * row.rate:.1f} % of {row.episodes}" for row in table.itertuples()]
    return f"Success rate of each policy with its interval: {'; '.join(parts)}."


def badges(rows: pd.DataFrame) -> list[str]:
    """How these rows were obtained. Rollouts are always measured; what else holds is read from the rows."""
    found = ["measured"]
    if rows["benchmark"].astype(str).str.startswith("tabletop").any():
        found.append("built-in")
    if (rows["note"] == "tiny random model").any():
        found.append("tiny-random")
    return found
