"""What a policy server costs: the round trip of one 224 px picture beside predicting in this process, and latency under
1, 8 and 32 clients. The server is a process of its own; the clients are threads of this one.

"instant" answers zeros, so its whole round trip is overhead; "tiny" is a tiny random qwen2_5_vl at 224 px.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.client import RemotePolicy

SIZE, CHUNK, REQUESTS, GOAL_MS = 224, 10, 300, 2.0
WORDS = ["put the red cube on the green plate"]


class Instant:
    """Answers at once."""

    def predict(self, images: np.ndarray, instructions: Any) -> SimpleNamespace:
        return SimpleNamespace(actions=np.zeros((len(images), CHUNK, 7), np.float32))


def make(name: str) -> Any:
    if name == "instant":
        return Instant()
    import torch

    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    torch.set_num_threads(1)
    bounds = {"q01": (-1.0,) * 7, "q99": (1.0,) * 7}
    return VLAPolicy(tiny(image_size=SIZE), PolicyConfig(CHUNK, TABLETOP, camera="front", width=64, **bounds))


def host(name: str, port: Any) -> None:
    """The server's process."""
    import asyncio

    from vlm4vla_core.serve import Limits, PolicyServer

    told = {"model": name, "convention": TABLETOP.to_dict(), "chunk": CHUNK, "camera": "front"}
    server = PolicyServer(make(name), told, limits=Limits(rate=1e6))
    asyncio.run(server.run("127.0.0.1", 0, asyncio.Event(), port.put))


def spent(pid: int) -> float:
    """CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def single(policy: Any, remote: RemotePolicy, server: int) -> dict[str, float]:
    """Predictions here and there by turns, one picture each; milliseconds."""
    image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    for _ in range(20):
        policy.predict(image, WORDS), remote.predict(image, WORDS)
    here, there, cpu_here, cpu = [], [], 0.0, spent(server)
    cpu_there = 0.0
    for _ in range(REQUESTS):
        began = time.process_time()
        here.append(timed(lambda: policy.predict(image, WORDS)))
        between = time.process_time()
        there.append(timed(lambda: remote.predict(image, WORDS)))
        cpu_here, cpu_there = cpu_here + between - began, cpu_there + time.process_time() - between
    both = cpu_there + spent(server) - cpu
    return {
        "in_process_ms": statistics.median(here),
        "remote_ms": statistics.median(there),
        "overhead_ms": statistics.median(there) - statistics.median(here),
        "overhead_least_ms": min(there) - min(here),
        "overhead_cpu_ms": (both - cpu_here) / REQUESTS * 1e3,
    }


def crowd(address: str, clients: int) -> dict[str, float]:
    """Latency in ms when every client asks again as soon as it is answered."""

    def one(number: int) -> list[float]:
        image = np.random.default_rng(number).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
        with RemotePolicy(address) as remote:
            remote.predict(image, WORDS)
            return [timed(lambda: remote.predict(image, WORDS)) for _ in range(max(10, REQUESTS // clients))]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = np.concatenate(list(pool.map(one, range(clients))))
    seconds = time.perf_counter() - began
    p50, p95 = np.percentile(latencies, [50, 95])
    return {"clients": clients, "p50_ms": p50, "p95_ms": p95, "requests_per_s": len(latencies) / seconds}


def main() -> None:
    spawn, result = multiprocessing.get_context("spawn"), {}
    for name in ("instant", "tiny"):
        port: Any = spawn.Queue()
        server = spawn.Process(target=host, args=(name, port), daemon=True)
        server.start()
        address = f"127.0.0.1:{port.get(timeout=120)}"
        try:
            with RemotePolicy(address) as remote:
                one = single(make(name), remote, server.pid or 0)
            rows = [crowd(address, clients) for clients in (1, 8, 32)]
        finally:
            server.terminate()
            server.join(10)
        result[name] = {"one": one, "crowd": rows}
        print(name, ", ".join(f"{key} {value:.2f}" for key, value in one.items()))
        for row in rows:
            print(
                "  {clients:3} clients: p50 {p50_ms:7.2f} ms, p95 {p95_ms:7.2f} ms, {requests_per_s:6.0f}/s".format(
                    **row
                )
            )
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: other work ran on the machine"
    command = "OMP_NUM_THREADS=1 python benchmarks/serve.py"
    made = {"command": command, "goal": f"overhead below {GOAL_MS} ms", "note": load, **folders.provenance()}
    folders.write_json(Path(__file__).parent / "results" / "serve.json", result | {"made_by": made})


if __name__ == "__main__":
    main()
