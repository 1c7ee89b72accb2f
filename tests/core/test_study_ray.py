"""Studies on a real local Ray cluster: the same results as here, also when a worker or a machine dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vlm4vla_core.study import expand, read_study
from vlm4vla_core.study import run as running
from vlm4vla_core.study.bundle import numbers
from vlm4vla_core.study.collect import collect
from vlm4vla_core.study.state import DONE, RUNNING
from vlm4vla_core.study.work import LOG

pytestmark = pytest.mark.slow  # a cluster takes seconds to start and gigabytes of memory

STUDY = """
name = "cluster"
[[data]]
name = "none"
world = "tabletop"
[[benchmark]]
protocol = "tabletop-tasks@1"
preset = "tiny"
data = "none"
episodes = 40
baselines = ["zero", "random", "scripted"]
"""


@pytest.fixture
def cluster():
    pytest.importorskip("ray", reason="needs Ray: pip install 'vlm4vla[cluster]'")
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8, "include_dashboard": False}
    )
    nodes = [made.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    made.wait_for_nodes(timeout=60)
    yield made, nodes
    import ray

    ray.shutdown()
    made.shutdown()


def planned(folder: Path):
    (folder / "study.toml").write_text(STUDY)
    return expand(read_study(folder / "study.toml"))


def until(condition, seconds: float = 120.0) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


@pytest.mark.parametrize("victim", ["worker", "node"])
def test_a_study_survives_the_death_of_a_worker_and_of_a_machine(tmp_path, cluster, victim, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made, nodes = cluster
    plan, out = planned(tmp_path), tmp_path / "out"
    struck: list[Path] = []

    def strike() -> None:
        until(lambda: bool(list(out.glob(f"jobs/*/{RUNNING}"))))  # the command takes some seconds from here
        beat = next(out.glob(f"jobs/*/{RUNNING}"))
        worker = parent(json.loads(beat.read_text())["pid"])
        if victim == "node":
            (lost,) = (node for node in nodes if raylet(node) == parent(worker))
            made.remove_node(lost, allow_graceful=False)
        else:
            os.kill(worker, signal.SIGKILL)
        struck.append(beat.parent)

    striker = threading.Thread(target=strike)
    striker.start()
    status = running.run(plan, out, running.Ray(made.address, 2))
    striker.join(timeout=120)
    assert len(status.of("done")) == 3 and len(list(out.glob(f"jobs/*/{DONE}"))) == 3
    assert len(struck) == 1 and (struck[0] / LOG).read_text().count("$ vlm4vla evaluate") == 2  # begun twice
    here = tmp_path / "here"
    running.run(plan, here, running.Local(1))
    assert numbers(collect(plan, out).episodes) == numbers(collect(plan, here).episodes)
