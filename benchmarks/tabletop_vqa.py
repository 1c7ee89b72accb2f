"""Can a tiny random VLM learn to answer questions about scenes at all?

Trains one tiny family on questions of a few kinds about recorded scenes, then asks the held-out questions of
tabletop-vqa@1, and the same of the untrained model.

Example: python benchmarks/tabletop_vqa.py --steps 450 --out run.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm4vla_core import folders
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.verbs import record
from vlm4vla_core.vqa import Question, pictures, questions
from vlm4vla_core.vqa.benchmark import describe, evaluate, score
from vlm4vla_core.vqa.embodied import NothingToAsk


def train(
    backbone: Backbone, store: EpisodeStore, kinds: tuple[str, ...], steps: int, batch_size: int, lr: float
) -> float:
    """Next-token loss on answers, AdamW with warm-up and cosine; returns CPU seconds."""
    optimizer = torch.optim.AdamW(backbone.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08)
    began = time.process_time()
    backbone.train()
    for step in range(steps):
        rng = np.random.default_rng([0, step])
        rows, asked = draw(store, kinds, batch_size, rng)
        shown = pictures(store, "front", rows, asked, backbone.image_size)
        loss = backbone.language_loss(shown, [one.question for one in asked], [one.answer for one in asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.process_time() - began:.0f} CPU s", flush=True)
    return time.process_time() - began


def draw(
    store: EpisodeStore, kinds: tuple[str, ...], number: int, rng: np.random.Generator
) -> tuple[list[int], list[Question]]:
    """Random rows of which these kinds ask something, and a question of each."""
    rows: list[int] = []
    asked: list[Question] = []
    while len(rows) < number:
        row = int(rng.integers(len(store)))
        try:
            asked.append(questions(store, row, rng, kinds=kinds))
        except NothingToAsk:
            continue
        rows.append(row)
    return rows, asked


def scores(backbone: Backbone, folder: Path, kinds: tuple[str, ...], number: int) -> dict[str, Any]:
    """Accuracies of tabletop-vqa@1 on these kinds."""
    backbone.save(folder / "checkpoint")
    found = score(evaluate(folder / "checkpoint", folder / "rows", kinds=kinds, episodes=number))
    print(found.table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    return {"kinds": found.table.to_dict("records"), "score": found.score, "interval": list(found.interval)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="qwen3_vl")
    parser.add_argument("--kinds", nargs="+", default=["colour"])
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--number", type=int, default=200, help="held-out questions of each kind")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of this run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = tuple(args.kinds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "store"
        record.run(record.Args("tabletop", args.scenes, store, tasks=("scene",), workers=1))
        backbone = tiny(args.family, seed=0, language_head=True)
        before = scores(backbone, folder / "before", kinds, args.number)
        seconds = train(backbone, EpisodeStore.open(store), kinds, args.steps, args.batch_size, args.lr)
        after = scores(backbone.eval(), folder / "after", kinds, args.number)
    result = {
        "command": f"python benchmarks/tabletop_vqa.py --family {args.family} --kinds {' '.join(kinds)} --steps "
        f"{args.steps} --batch-size {args.batch_size} --lr {args.lr} --scenes {args.scenes} --number {args.number}",
        "what": "a tiny random model trained from scratch with the next-token loss on generated questions, one seed",
        "model": f"tiny {args.family}, {sum(p.numel() for p in backbone.parameters())} parameters",
        "training_cpu_s": round(seconds, 1),
        "benchmark": describe(),
        "untrained": before,
        "trained": after,
        "hardware": "one thread of a two-core machine shared with other jobs; CPU time",
        "made_by": folders.provenance(),
    }
    folders.write_json(args.out, result)


if __name__ == "__main__":
    main()
