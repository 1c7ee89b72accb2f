"""CALVIN (Mees et al. 2022, arXiv 2112.03227) in its own simulator, from a checkout that the user brings.

`calvin-abc-d@1`: the official 1000 chains of five instructions in scene D, for policies trained in A, B and C.
Trap: the first N chains are a part of the benchmark, and no number from them is the benchmark's.
"""

from __future__ import annotations

from typing import Any

from vlm4vla_core.actions import CALVIN
from vlm4vla_core.sims.simulator import SimulatorBenchmark


class CalvinBenchmark(SimulatorBenchmark):
    """The protocol, and what it needs of the user's checkout."""

    @property
    def kept_for_test(self) -> set[str]:
        return {"D"}

    @property
    def train_domains(self) -> tuple[str, ...]:
        return ("A", "B", "C")

    def portion(self, episodes: int) -> str:
        """What the first chains are called; "" for all of them."""
        return "" if episodes >= self.episodes else f"the first {episodes} of {self.episodes:,} chains"

    def missing(self) -> list[str]:
        from vlm4vla_core.sims.calvin.checkout import missing

        return super().missing() + missing()

    def describe(self) -> dict[str, Any]:
        from vlm4vla_core.sims.calvin import chains, checkout

        folder = checkout.named()
        return super().describe() | {
            "scene": "D",
            "train_scenes": list(self.train_domains),
            "steps_per_part": 360,
            "chains_sha256": chains.CHAINS_SHA256,
            "states_sha256": chains.STATES_SHA256,
            "calvin": checkout.commit(folder) if folder else "unknown",
            "calvin_env": checkout.commit(folder / "calvin_env") if folder else "unknown",
            "deviations": "loaded anew before each chain; the gripper's last command starts as open",
        }


def _benchmark() -> CalvinBenchmark:
    from vlm4vla_core.episodes.calvin import STATE
    from vlm4vla_core.sims.calvin.expert import TASKS

    return CalvinBenchmark(
        name="calvin-abc-d", version=1,
        title="CALVIN ABC-D: chains of five instructions in scene D; policies trained in scenes A, B, C",
        tasks=("chain",), convention=CALVIN, cameras=("rgb_static", "rgb_gripper"), state_names=STATE,
        success_rule="any_step", step_limits={"chain": 1800}, action_limit=(1.0,) * 7, episodes=1000,
        factory="vlm4vla_core.sims.calvin.simulator:CalvinSimulator", environment="calvin",
        modules=("pybullet_utils", "omegaconf"), options={"renderer": ("tiny", "egl")}, experts=TASKS,
    )  # fmt: skip


PROTOCOLS: dict[str, SimulatorBenchmark] = {bench.protocol: bench for bench in (_benchmark(),)}
