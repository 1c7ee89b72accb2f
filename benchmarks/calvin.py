"""CALVIN with pictures only where the policy needs them, beside rendering at every step as calvin_env does.

Runs where CALVIN runs: CALVIN_ROOT=… .venv-calvin/bin/python benchmarks/calvin.py. Seconds are CPU seconds of this
process, everything in one process and by turns, so that other work on the machine weighs on all rows alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.sims.calvin import PROTOCOLS

STEPS, ROUNDS, CHUNK, GOAL = 60, 5, 10, 5.0


def episode(world: Any, look: Callable[[Any, int], None]) -> tuple[float, float]:
    """CPU and wall seconds of STEPS steps of the first chain; look: what is rendered before step k."""
    seen, _ = world.reset("chain", 0)
    cpu, wall = time.process_time(), time.perf_counter()
    for k in range(STEPS):
        look(seen, k)
        seen = world.step(np.array([0.0] * 6 + [1]))
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    world: Any = PROTOCOLS["calvin-abc-d@1"].make({"renderer": "tiny"})
    cameras = ("rgb_static", "rgb_gripper")

    def every(seen: Any, _: int) -> None:
        for camera in cameras:
            seen.render(camera)

    def chunk_both(seen: Any, k: int) -> None:
        if k % CHUNK == 0:
            every(seen, k)

    def chunk_one(seen: Any, k: int) -> None:
        if k % CHUNK == 0:
            seen.render("rgb_static")

    ways = {
        "both cameras at every step (calvin_env)": every,
        f"both cameras at every {CHUNK}th step": chunk_both,
        f"the policy's camera at every {CHUNK}th step (ours)": chunk_one,
        "no pictures": lambda seen, _: None,
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    world.reset("chain", 0)
    for _ in range(ROUNDS):
        for name, look in ways.items():
            taken[name].append(episode(world, look))
    cpu = {name: float(np.median([one[0] for one in times])) / STEPS * 1e3 for name, times in taken.items()}
    wall = {name: float(np.median([one[1] for one in times])) / STEPS * 1e3 for name, times in taken.items()}
    first = next(iter(ways))
    rows = [
        {
            "way": name,
            "cpu_ms_per_step": cpu[name],
            "wall_ms_per_step": wall[name],
            "times_faster": cpu[first] / cpu[name],
        }
        for name in ways
    ]
    for row in rows:
        print(
            "{way:52} {cpu_ms_per_step:7.2f} ms CPU  {wall_ms_per_step:7.2f} ms  {times_faster:6.1f} times".format(
                **row
            )
        )
    resets = []
    for chain in range(10):
        began = time.process_time()
        world.reset("chain", chain)
        resets.append((time.process_time() - began) * 1e3)
    print(f"reset with reloading: {np.median(resets):.0f} ms CPU")
    result = {
        "rows": rows, "reset_cpu_ms": float(np.median(resets)), "goal": f"at least {GOAL:g} times", "chunk": CHUNK,
        "reached": rows[2]["times_faster"] >= GOAL, "renderer": "tiny", "calvin_env": world.outcome()["note"],
        "made_by": {
            "command": "CALVIN_ROOT=CHECKOUT .venv-calvin/bin/python benchmarks/calvin.py",
            "note": f"medians of {ROUNDS} rounds of {STEPS} steps; CPU time; other work ran on the machine",
            **folders.provenance(),
        },
    }  # fmt: skip
    world.close()
    folders.write_json(Path(__file__).parent / "results" / "calvin.json", result)


if __name__ == "__main__":
    main()
