"""The zoo as it ships: capability and cost of every nano VLM, what fp16 storage changes, and a sheet of answers.

Reads the cards; with --again N the stored weights are asked the first N questions of each kind of tabletop-vqa@1 once
more (the card's scores are of the weights before storage). The sheet shows the default's first right and wrong answers.

Example: python benchmarks/nano_zoo.py --again 200 --json benchmarks/results/nano_zoo.json --sheet docs/nano-zoo.png
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.nano import CARD
from vlm4vla_core.presets import DEFAULT
from vlm4vla_core.vqa.benchmark import evaluate, item, score, show
from vlm4vla_core.vqa.general import GENERAL

ZOO = Path(DEFAULT).parent
SHOWN = ("where", "shape", "left", "closest", "colour", "behind")


def again(folder: Path, number: int) -> dict[str, Any]:
    """The stored weights' own scores, and the CPU seconds that asking took."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        found = score(evaluate(folder, Path(temporary) / "rows", episodes=number))
    return {
        "score": found.score, "interval": list(found.interval), "questions": found.n,
        "kinds": found.table.to_dict("records"), "cpu_s": round(time.process_time() - began, 1),
    }  # fmt: skip


def sheet(path: Path, number: int = 30) -> None:
    """One right and one wrong answer of each kind of `SHOWN`, the first of `number` questions, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vlm4vla_core import load_backbone
    from vlm4vla_core.answers import answer
    from vlm4vla_core.vqa.benchmark import normalised

    backbone = load_backbone(DEFAULT)
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(3 * len(SHOWN), 8), layout="constrained")
    for column, kind in enumerate(SHOWN):
        items = [item(kind, index) for index in range(number)]
        said, pictures = answer(backbone, show(items), [one.question for one in items], max_tokens=12), show(items)
        right = np.array([normalised(a) == normalised(one.answer) for a, one in zip(said, items, strict=True)])
        for line, wanted in enumerate((True, False)):
            axis = axes[line, column]
            axis.axis("off")
            if not (right == wanted).any():
                axis.text(0.5, 0.5, f"none of {number}", ha="center", color="gray")
                continue
            index = int(np.flatnonzero(right == wanted)[0])
            axis.imshow(pictures[index])
            question = items[index].question.split(":")[0].split(", ")[0].rstrip("?") + "?"
            truth = "" if wanted else f"\n(right: {items[index].answer})"
            colour = "darkgreen" if wanted else "firebrick"
            axis.set_title(f"{textwrap.fill(question, 30)}\n{said[index]}{truth}", fontsize=9, color=colour)
    figure.suptitle("First right (above) and wrong (below) answers of the default nano VLM on held-out scenes")
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    given = parser.parse_args()
    rows = []
    for folder in sorted(card.parent for card in ZOO.glob(f"*/{CARD}")):
        card = folders.read_json(folder / CARD)
        told = card["capability"]
        row = {key: card[key] for key in ("name", "family", "size", "parameters", "pictures_seen", "training_cpu_s")}
        row |= {"bytes": sum(file.stat().st_size for file in folder.iterdir()), "fp32": told}
        rows.append(row | ({"stored": again(folder, given.again)} if given.again else {}))
    rows.sort(key=lambda row: -row["fp32"]["score"])
    print("| model | parameters | CPU s | score [95 %] | " + " | ".join(GENERAL) + " |")
    print("|" + "---|" * (4 + len(GENERAL)))
    for row in rows:
        told, rates = row["fp32"], {kind["kind"]: kind for kind in row["fp32"]["kinds"]}
        cells = [f"{rates[kind]['accuracy']:.2f}" for kind in GENERAL]
        low, high = told["interval"]
        print(
            f"| {row['name']} | {row['parameters'] / 1e6:.2f} M | {row['training_cpu_s']:.0f} | {told['score']:.3f} "
            f"[{low:.3f}, {high:.3f}] | " + " | ".join(cells) + " |"
        )
        if given.again:
            print(f"  stored in fp16: {row['stored']['score']:.3f}", file=sys.stderr)
    if given.json:
        about = {
            "command": " ".join(sys.argv), "date": datetime.date.today().isoformat(), "made_by": folders.provenance(),
            "hardware": "one thread of a two-core machine shared with other jobs; CPU time",
        }  # fmt: skip
        folders.write_json(given.json, {**about, "models": rows})
    if given.sheet:
        sheet(given.sheet)


if __name__ == "__main__":
    main()
