"""Speed of the built-in world: pictures, physics with expert, closed-loop evaluation, recording.

Run:  OMP_NUM_THREADS=1 python benchmarks/tabletop.py [--out benchmarks/results/tabletop.json]
CPU time of one process and one thread, the best of some repeats; recording is wall time of two processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vlm4vla_core import folders
from vlm4vla_core.backbone import tiny
from vlm4vla_core.evaluation import PolicyActor, rollout
from vlm4vla_core.policy import PolicyConfig, VLAPolicy
from vlm4vla_core.sims import benchmark
from vlm4vla_core.sims.tabletop import scenes, tasks, world
from vlm4vla_core.sims.tabletop.expert import expert
from vlm4vla_core.sims.tabletop.render import render
from vlm4vla_core.verbs import record

GOALS = {
    "frames_per_s_64": 1000.0, "frames_per_s_112_geometry": 400.0, "steps_per_s_1024": 120_000.0,
    "steps_per_s_4096": 120_000.0, "evaluation_steps_per_s": 400.0, "recording_1000_s": 15.0,
}  # fmt: skip


def best(work: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds, the best of the repeats, after one that warms up."""
    work()
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


def worlds(n: int) -> tuple[world.State, tasks.Goal]:
    """n worlds of all families, 256 different ones."""
    starts = [scenes.start(tasks.TASKS[i % len(tasks.TASKS)], i) for i in range(256)]
    state = world.stack([starts[i % 256].state for i in range(n)])
    return state, tasks.goals(state, [starts[i % 256].asks[0] for i in range(n)])


def act(state: world.State, goal: tasks.Goal, steps: int) -> world.State:
    for _ in range(steps):
        state = world.step(state, expert(state, goal))
    return state


def evaluation() -> tuple[float, int]:
    """Steps of live episodes per CPU second in closed loop, and how many: the default tiny VLA, 112 px, 64 episodes."""
    bench = benchmark("tabletop-tasks@1")
    config = PolicyConfig(chunk=10, convention=bench.convention, q01=(-0.06,) * 7, q99=(0.06,) * 7, camera="front")
    actor = PolicyActor(VLAPolicy(tiny(), config), config.chunk, {"model": "tiny"})
    cells = [(task, i) for i in range(10) for task in bench.tasks][:64]
    list(rollout(bench, actor, cells[:4]))
    began = time.process_time()
    steps = sum(row["steps"] for row in rollout(bench, actor, cells))
    return steps / (time.process_time() - began), steps


def recording() -> float:
    """Wall seconds of 1,000 demonstrations of touch, push, pick and put: one camera, 64 px, two processes."""
    with tempfile.TemporaryDirectory() as folder:
        args = record.Args(
            "tabletop", 1000, Path(folder) / "store", tasks=("touch", "push", "pick", "put"), size=64, workers=2
        )
        began = time.perf_counter()
        record.run(args)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tabletop.json")
    out, load = parser.parse_args().out, os.getloadavg()[0]
    torch.set_num_threads(1)
    state, goal = worlds(256)
    state = act(state, goal, 6)
    looks = np.resize(list("ABC"), 256).tolist()
    found = {
        "frames_per_s_64": 256 / best(lambda: render(state, looks, 64)),
        "frames_per_s_112": 256 / best(lambda: render(state, looks, 112)),
        "frames_per_s_112_geometry": 256 / best(lambda: render(state, looks, 112, geometry=True)),
        "frames_per_s_64_wrist": 256 / best(lambda: render(state, looks, 64, camera="wrist")),
        "frames_per_s_224_samples_3": 16 / best(lambda: render(state[:16], looks[:16], 224, samples=3), 2),
    }
    for n in (1024, 4096):
        many, asked = worlds(n)
        found[f"steps_per_s_{n}"] = n * 20 / best(lambda s=many, g=asked: act(s, g, 20))  # type: ignore[misc]
    found["evaluation_steps_per_s"], steps = evaluation()
    found["recording_1000_s"] = recording()
    for name, value in found.items():
        goal_text = f"  goal {GOALS[name]:,.0f}" if name in GOALS else ""
        print(f"{name:28s} {value:12,.1f}{goal_text}")
    made_by = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/tabletop.py",
        "note": "CPU time of one process and thread, best of some repeats, other work on the machine; recording_1000_s "
        "is wall time. steps_per_s: physics and expert over 20 steps from the start, all families. "
        f"evaluation_steps_per_s: {steps} steps of live episodes",
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
        **folders.provenance(),
    }
    kept = folders.read_json(out) if out.exists() else {}  # what a slow test has found beside
    folders.write_json(out, kept | {"measured": found, "goals": GOALS, "made_by": made_by})


if __name__ == "__main__":
    main()
