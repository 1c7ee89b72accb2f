"""`tabletop-vqa@1`: what a VLM says about held-out scenes, scored by exact match; its mean is a capability score.

Each kind of `general.GENERAL` has its own scenes, one question each. Per kind stand the accuracy with its Wilson
interval and what always giving the commonest answer would score. The capability score is the mean over kinds of
(accuracy - majority) / (1 - majority), each not below 0: an answer in the wrong form is worth no less than ignorance.

Trap: the majority is counted on the questions that were asked. With few scenes it is too high by chance, and the
clipping at 0 lifts the mean of a model that knows nothing; compare models at equal `--episodes`, 200 or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.results import CAPABILITY_COLUMNS, wilson
from vlm4vla_core.sims.benchmarks import SEED_RULE, Benchmark
from vlm4vla_core.sims.tabletop import scenes, world
from vlm4vla_core.vqa.general import GENERAL, ask, sight

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.verbs.evaluate import Args

_LOOKS = ("U", "V", "W")
BENCH = Benchmark(
    "tabletop-vqa", 1, "questions about held-out scenes without the hand, answered in words",
    domains=_LOOKS, train_domains=_LOOKS, tasks=tuple(GENERAL),
)  # fmt: skip
MAX_TOKENS = 24  # of an answer; the longest right one is a caption of four objects
KIND = "answers"  # of the folder
_GROUP = 64  # answers between two writes
_RESAMPLES = 2000
COLUMNS = (
    "run_id", "model", "family", "lineage", "protocol", "kind", "number", "scene_seed", "domain", "question", "answer",
    "given", "correct",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question of the benchmark, and the scene that it is about."""

    kind: str
    number: int
    seed: int
    domain: str
    question: str
    answer: str


def item(kind: str, number: int) -> Item:
    """Question `number` of a kind: about the first of its scenes that allows one; a pure function of both."""
    for attempt in count():
        seed = BENCH.env_seed(f"scene {kind} {attempt}", number)
        domain = BENCH.domain(seed)
        if found := ask(sight(scenes.scene(seed), domain), kind, np.random.default_rng([seed, 5])):
            return Item(kind, number, seed, domain, *found)
    raise AssertionError("unreachable")


def show(items: Sequence[Item]) -> np.ndarray:
    """The pictures (n, H, W, 3) uint8 that the questions are asked of."""
    from vlm4vla_core.sims.tabletop.render import render

    state = world.stack([scenes.scene(one.seed) for one in items])
    return render(state, [one.domain for one in items], BENCH.image_size, hand=False).rgb


def normalised(text: str) -> str:
    """An answer as it is compared: lower case, single blanks, without a full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".")


def describe() -> dict[str, Any]:
    """The whole protocol as JSON values."""
    return {
        "protocol": BENCH.protocol, "title": BENCH.title, "world_version": world.VERSION, "kinds": list(GENERAL),
        "domains": list(_LOOKS), "image_size": BENCH.image_size, "max_tokens": MAX_TOKENS, "seeds": SEED_RULE,
        "success_rule": "the generated answer, in lower case, with single blanks and without a final full stop, equals "
        "the one that follows from the scene's state",
        "score": "mean over kinds of max(0, (accuracy - majority) / (1 - majority)), majority: share of the commonest "
        "answer",
    }  # fmt: skip


# --- scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Per kind and together. table: kind, questions, correct, accuracy, low, high, majority, normalised.

    score: the mean of `normalised`; stderr and interval (95 %, percentiles) from resampling scenes within each kind,
    with the majority held fixed. n: questions.
    """

    table: pd.DataFrame
    score: float
    stderr: float
    interval: tuple[float, float]
    n: int

    def to_frame(self) -> pd.DataFrame:
        return self.table


def score(rows: pd.DataFrame, seed: int = 0) -> Scores:
    """Scores of rows with the columns kind, answer and correct."""
    import pandas as pd

    made = []
    for kind, part in rows.groupby("kind", sort=False):
        n, right = len(part), int(part["correct"].sum())
        majority = part["answer"].value_counts().iloc[0] / n
        made.append((kind, n, right, right / n, *wilson(right, n), majority, _above(right / n, majority)))
    names = ["kind", "questions", "correct", "accuracy", "low", "high", "majority", "normalised"]
    table = pd.DataFrame(made, columns=names)
    n, rate = table["questions"].to_numpy(), table["accuracy"].to_numpy(float)
    # A scene has one question of its kind, so drawing scenes with replacement draws right answers binomially.
    again = np.random.default_rng(seed).binomial(n, rate, (_RESAMPLES, len(table))) / n  # (R, kinds)
    means = _above(again, table["majority"].to_numpy(float)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Scores(
        table, float(table["normalised"].mean()), float(means.std(ddof=1)), (float(low), float(high)), len(rows)
    )


def _above(accuracy: Any, majority: Any) -> Any:
    """How much of the way from the majority's accuracy to 1; 0 where all answers are the same, so nothing is shown."""
    room = np.where(np.asarray(majority) < 1, 1 - np.asarray(majority), np.inf)
    return np.maximum(0.0, (accuracy - np.asarray(majority)) / room)


def capability(rows: pd.DataFrame) -> pd.DataFrame:
    """The capability row (`results.CAPABILITY_COLUMNS`) of rows of one model over all kinds."""
    import pandas as pd

    found, first = score(rows), rows.iloc[0]
    row = {
        **{name: first[name] for name in ("model", "family", "lineage")}, "benchmark": BENCH.name,
        "score": found.score, "stderr": found.stderr, "n": found.n, "evaluator": "vlm4vla",
        "version": BENCH.protocol, "source": first["run_id"], "quality": "measured",
    }  # fmt: skip
    return pd.DataFrame([row], columns=list(CAPABILITY_COLUMNS))


# --- running --------------------------------------------------------------------------------------------------


def evaluate(model: str | Path, out: Path, *, kinds: Sequence[str] = (), episodes: int = 20) -> pd.DataFrame:
    """Ask a VLM the first `episodes` questions of each kind, and keep a row for each in `out`/rows.parquet.

    model: a checkpoint or run folder of this project (of a policy, its backbone answers), a Hugging Face folder or hub
    id. With rows of every kind there is `out`/capability.csv, too. Only what is missing is asked. Returns all rows of
    `out`. Raises InputError on unknown kinds, a model without an output layer, and when `out` is another model's.
    """
    import pandas as pd

    for kind in kinds:
        if kind not in GENERAL:
            raise InputError(f"{BENCH.protocol} has no questions of kind '{kind}'", fix=nearest(kind, GENERAL))
    if episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {episodes}")
    config, inputs = {"benchmark": describe()}, {"model": _fingerprint(Path(model))}
    rows = _finished(out, config, inputs)
    done = set() if rows is None else set(zip(rows["kind"], rows["number"], strict=True))
    cells = [(kind, number) for number in range(episodes) for kind in dict.fromkeys(kinds or GENERAL)]
    missing = [cell for cell in cells if cell not in done]
    if rows is not None and not missing:
        return rows
    from vlm4vla_core.answers import answer
    from vlm4vla_core.progress import progress

    backbone, labels = _load(model, inputs["model"])
    with progress(total=len(missing), what=f"evaluate {labels['model']}", unit="question") as bar:
        for start in range(0, len(missing), _GROUP):
            items = [item(*cell) for cell in missing[start : start + _GROUP]]
            said = answer(backbone, show(items), [one.question for one in items], max_tokens=MAX_TOKENS)
            fresh = [
                {
                    **labels, "protocol": BENCH.protocol, "kind": one.kind, "number": one.number,
                    "scene_seed": one.seed, "domain": one.domain, "question": one.question, "answer": one.answer,
                    "given": given, "correct": normalised(given) == normalised(one.answer),
                }
                for one, given in zip(items, said, strict=True)
            ]  # fmt: skip
            rows = pd.concat([rows, pd.DataFrame(fresh, columns=list(COLUMNS))], ignore_index=True)
            with folders.new_folder(out, KIND) as folder:
                rows.to_parquet(folder / "rows.parquet", index=False)
                if set(rows["kind"]) == set(GENERAL):
                    capability(rows).to_csv(folder / "capability.csv", index=False)
                folders.write_manifest(folder, KIND, config=config, inputs=inputs, questions=len(rows))
            bar.update(len(items))
    assert rows is not None
    return rows


def _fingerprint(path: Path) -> str:
    """What the answers depend on: of a Hugging Face folder names, sizes and times, of a hub id the id."""
    if checkpoint.looks_like_one(path):
        return str(folders.read_manifest(checkpoint.resolve(path), checkpoint.KIND)["fingerprint"])
    if not path.is_dir():
        return str(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return folders.fingerprint([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def _load(model: str | Path, run_id: str) -> tuple[Any, dict[str, Any]]:
    """A backbone that can answer, and what it contributes to every row."""
    import torch

    from vlm4vla_core.backbone import load_backbone

    backbone = load_backbone(model, language_head=True)
    if backbone.lm_head is None and not backbone.base.config.tie_word_embeddings:
        fix = "give the VLM that it was made from, or a checkpoint of the language objective"
        raise InputError("this checkpoint has no output layer to answer with", where=model, fix=fix)
    labels = {"run_id": run_id, "family": backbone.spec.name, "lineage": backbone.spec.name}
    labels["model"] = backbone.lineage.get("source", "unknown")
    return backbone.to("cuda" if torch.cuda.is_available() else "cpu").eval(), labels


def _finished(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> pd.DataFrame | None:
    """Rows already in `out`, None when there are none; refuses a folder of another model, or of anything else."""
    import pandas as pd

    if not (out / folders.MANIFEST).exists():
        folders.check_replaceable(out, KIND)
        return None
    manifest = folders.read_manifest(out, KIND)
    if manifest["config"] != config or manifest["inputs"] != inputs:
        fix = "give another --out, or remove it"
        raise InputError("this folder holds answers of another model or protocol", where=out, fix=fix)
    return pd.read_parquet(out / "rows.parquet")


def _default_out(model: Path) -> Path:
    """A folder of its own for every checkpoint, beside the run's others."""
    if not checkpoint.looks_like_one(model):
        return Path("runs/eval") / model.name / BENCH.protocol
    folder = checkpoint.resolve(model)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return run / "eval" / f"{BENCH.protocol}-{folder.name}"


def run(args: Args) -> int:
    """`vlm4vla evaluate MODEL --benchmark tabletop-vqa@1`; --tasks are kinds of questions."""
    if args.benchmark != BENCH.protocol:
        raise InputError(f"unknown benchmark '{args.benchmark}'", fix=nearest(args.benchmark, [BENCH.protocol]))
    if args.execute is not None or args.data is not None or args.video is not None:
        raise InputError(f"{BENCH.protocol} asks questions", fix="leave --execute, --data and --video out")
    if not args.policy:
        raise InputError("no model is given", fix="give a checkpoint or run folder, or a Hugging Face folder or hub id")
    out = args.out or _default_out(Path(args.policy))
    rows = evaluate(args.policy, out, kinds=args.tasks, episodes=args.episodes)
    kinds = tuple(dict.fromkeys(args.tasks)) or tuple(GENERAL)
    wanted = rows[(rows["number"] < args.episodes) & rows["kind"].isin(kinds)]
    found, part = score(wanted), f"{len(kinds)} of {len(GENERAL)} kinds of questions"
    low, high = found.interval
    print(
        f"{args.policy} on {BENCH.protocol}, {part}; exact match, Wilson intervals beside the commonest answer's share"
    )
    print(found.table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(
        f"above majority, mean over kinds: {found.score:.3f} [{low:.3f}, {high:.3f}], standard error {found.stderr:.3f}"
    )
    print(f"rows in {out / 'rows.parquet'}")
    if args.json:
        summary = {
            "policy": args.policy, "benchmark": describe(), "coverage": part, "kinds": found.table.to_dict("records"),
            "score": found.score, "stderr": found.stderr, "interval": [low, high], "questions": found.n,
            "rows": str(out / "rows.parquet"),
        }  # fmt: skip
        folders.write_json(args.json, summary)
    return 0
