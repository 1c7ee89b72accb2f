"""The worker pool beside simulators stepped alone, and policy batching.

Steps per second of N workers with a tiny policy in this process, over those of the same simulator stepped by as many
processes that ask nobody (goal: at least 85 %); and pictures per second of one prediction of 8 pictures over 8
predictions of one (goal: at least 3x with the nano VLA on a CPU).

Run:  OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--benchmark libero-spatial@1] [--task 0] [--workers 2]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.actors import PolicyActor
from vlm4vla_core.sims import benchmark, pool

EXECUTE, GOAL_POOL, GOAL_BATCH = 4, 0.85, 3.0
ALONE = """
import sys, time, numpy as np
from vlm4vla_core.actors import Driver
from vlm4vla_core.sims import benchmark
from vlm4vla_core.sims.worker import Order, play
name, task, execute, camera, options, *episodes = sys.argv[1:]
bench = benchmark(name)
sim = bench.make(bench.chosen(tuple(options.split())))
chunk = np.zeros((int(execute), bench.convention.size)); chunk[:, -1] = bench.convention.gripper_open
driver = Driver(bench.convention, int(execute), "none", camera)
for number, episode in enumerate(episodes):
    wall, cpu = time.perf_counter(), time.process_time()
    steps = play(sim, Order(task, int(episode), 0), driver, lambda picture, words: chunk)["steps"]
    print("RATE", number, steps, time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


def policy(bench: Any, size: int) -> Any:
    """The nano preset's VLA with weights as they are drawn, in the benchmark's convention."""
    import torch

    from vlm4vla_core.nano import nano
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    torch.set_num_threads(1)
    span = tuple(bench.action_limit)
    bounds = {"q01": tuple(-one for one in span), "q99": span}
    config = PolicyConfig(EXECUTE, bench.convention, camera=bench.cameras[0], head="mlp", width=256, **bounds)
    return VLAPolicy(nano(image_size=size), config)


class Still:
    """A policy that costs nothing and moves nothing: what is left is the pool's own cost."""

    def __init__(self, bench: Any) -> None:
        from types import SimpleNamespace

        self.config, self._bench = SimpleNamespace(camera=bench.cameras[0]), bench

    def predict(self, images: np.ndarray, words: Any) -> Any:
        from types import SimpleNamespace

        actions = np.zeros((len(images), EXECUTE, self._bench.convention.size))
        actions[..., -1] = self._bench.convention.gripper_open
        return SimpleNamespace(actions=actions)


def alone(bench: Any, task: str, workers: int, episodes: int, options: str) -> tuple[float, float]:
    """Aggregate steps per second of so many processes that ask nobody, and their CPU seconds per step; the first
    episode of each, which loads and compiles, is left out."""
    command = [pool.interpreter(bench), "-c", ALONE, bench.protocol, task, str(EXECUTE), bench.cameras[0], options]
    numbers = [[str(worker + workers * k) for k in range(episodes)] for worker in range(workers)]
    running = [
        subprocess.Popen([*command, *own], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for own in numbers
    ]
    rate, cpu, steps = 0.0, 0.0, 0
    for process in running:
        lines = [line.split() for line in process.communicate()[0].splitlines() if line.startswith("RATE")]
        found = [[float(value) for value in words[2:]] for words in lines if words[1] != "0"]
        rate += sum(one[0] for one in found) / sum(one[1] for one in found)
        cpu, steps = cpu + sum(one[2] for one in found), steps + int(sum(one[0] for one in found))
    return rate, cpu / steps


def pooled(bench: Any, task: str, workers: int, episodes: int, options: str, model: Any) -> tuple[float, float, int]:
    """Aggregate steps per second of the pool, this process's CPU seconds per step, and steps; again without each
    worker's first episode."""
    actor = PolicyActor(model, EXECUTE, {"model": "benchmark"})
    cells = [(task, number) for number in range(workers * episodes)]
    chosen = bench.chosen(tuple(options.split()))
    cpu = time.process_time()
    rows = list(pool.rollout(bench, actor, cells, workers=workers, options=chosen, timeout=3600))
    steps = sum(row["steps"] for row in rows)
    warm = sorted(rows, key=lambda row: row["wall_s"])[: len(rows) - workers]  # the slowest are the first ones
    rate = workers * sum(row["steps"] for row in warm) / sum(row["wall_s"] for row in warm)
    return rate, (time.process_time() - cpu) / steps, steps


def batching(bench: Any, size: int, pictures: int = 8, repeats: int = 20) -> dict[str, float]:
    """CPU ms per picture, one by one and together, of the nano VLA, and what of that is the library's own forward pass
    on a prepared batch: what no work on preparing pictures and words or on decoding actions can save."""
    import torch

    model, words = policy(bench, size), ["pick up the black bowl and place it on the plate"] * pictures
    shown = np.random.default_rng(0).integers(0, 255, (pictures, size, size, 3)).astype(np.uint8)
    prepared = model.backbone.collate(shown, words)
    alone = [model.backbone.collate(shown[i : i + 1], words[i : i + 1]) for i in range(pictures)]
    ways: dict[str, Any] = {
        "one_ms": lambda: [model.predict(shown[i : i + 1], words[i : i + 1]) for i in range(pictures)],
        "of_8_ms": lambda: model.predict(shown, words),
        "forward_of_one_ms": lambda: [model.backbone(batch) for batch in alone],
        "forward_of_8_ms": lambda: model.backbone(prepared),
    }
    model.eval()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(repeats + 2):
            for name, way in ways.items():
                began = time.process_time()
                way()
                if turn > 1:
                    spent[name].append(time.process_time() - began)
    told = {name: 1000 * float(np.median(values)) / pictures for name, values in spent.items()}
    return told | {
        "ratio": told["one_ms"] / told["of_8_ms"],
        "ratio_with_nothing_but_the_forward_in_the_batch": told["one_ms"] / told["forward_of_8_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--benchmark", default="tabletop-tasks@1")
    parser.add_argument("--task", default="pick")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--options", default="")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only-still", action="store_true", help="leave the nano VLA out: the pool's own cost alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = benchmark(args.benchmark)
    rounds: dict[str, list[Any]] = {"alone": [], "still": [], "nano": []}
    shared = (bench, args.task, args.workers, args.episodes, args.options)
    for _ in range(args.rounds):
        rounds["alone"].append(alone(*shared))
        rounds["still"].append(pooled(*shared, Still(bench))[:2])
        if not args.only_still:
            rounds["nano"].append(pooled(*shared, policy(bench, 112))[:2])
    found: dict[str, Any] = {}
    own = float(np.median([rate for rate, _ in rounds["alone"]]))
    print(
        f"{args.benchmark}, task {args.task}, {args.workers} workers, {EXECUTE} actions a look, load {os.getloadavg()}"
    )
    print(f"{'':<22}{'steps/s':>10}{'of its own':>12}{'CPU ms a step':>15}")
    for name, values in ((name, values) for name, values in rounds.items() if values):
        rate, cpu = (float(np.median([value[i] for value in values])) for i in (0, 1))
        found[name] = {"steps_per_s": rate, "of_its_own": rate / own, "cpu_ms_per_step": 1000 * cpu}
        print(f"{name:<22}{rate:10.1f}{rate / own:12.2f}{1000 * cpu:15.2f}")
    # On a loaded machine the clock measures the neighbours; CPU time says what the pool's process takes of the cores.
    share = found["alone"]["cpu_ms_per_step"] / (found["alone"]["cpu_ms_per_step"] + found["still"]["cpu_ms_per_step"])
    found["share_of_cpu_left_to_simulators"] = share
    print(f"CPU left to the simulators beside the pool's own process: {share:.1%} (goal {GOAL_POOL:.0%})")
    if not args.only_still:
        batch = found["batching_nano_cpu"] = batching(bench, 112)
        print(f"nano VLA: {batch['one_ms']:.1f} ms a picture alone, {batch['of_8_ms']:.1f} ms of 8 together: "
              f"{batch['ratio']:.2f}x (goal {GOAL_BATCH:g}x)")  # fmt: skip
    if args.out:
        told = {
            "command": "OMP_NUM_THREADS=1 " + " ".join(["python", *sys.argv]), "benchmark": args.benchmark,
            "task": args.task, "workers": args.workers, "episodes_per_worker": args.episodes, "options": args.options,
            "execute": EXECUTE, "goals": {"of_its_own": GOAL_POOL, "batching": GOAL_BATCH},
            "load_average": os.getloadavg(), **found, "made_by": folders.provenance(),
        }  # fmt: skip
        folders.write_json(args.out, told)


if __name__ == "__main__":
    main()
