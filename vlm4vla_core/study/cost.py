"""What a study would cost, before it is paid for: operations of trainings and policies, core-seconds of simulators.

A training step takes 6 operations per parameter and token (forward 2, backward 4; Kaplan et al. 2020, section 2.1), 2
fewer for a frozen parameter that gradients still pass through; a prediction takes 2.

Trap: an estimate, from counts of parameters and a share of the peak. Once jobs of a kind have run in the study's
folder, their measured seconds correct it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.study.jobs import Job, Plan
from vlm4vla_core.study.state import Status

PROMPT_TOKENS = 40  # of instruction and template, beside the image's
UTILISATION = 0.4  # share of the peak that trainings of models of billions reach
# Peak dense bf16 operations per second as the makers state them; a core as measured on nano models (see docs).
DEVICES = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "rtx4090": 165e12, "cpu-core": 6e9}
# Core-seconds of a simulator's step with its pictures, measured on one CPU core (docs/simulators.md).
SIMULATOR_S = {"tabletop": 0.0005, "libero": 0.13, "simpler": 0.19, "calvin": 0.05}


@dataclass(frozen=True)
class Cost:
    """operations: of the model; core_s: seconds of a CPU core for simulators; samples: trained on or predicted."""

    operations: float = 0.0
    core_s: float = 0.0
    samples: int = 0

    def gpu_hours(self, device: str) -> float:
        """Hours of one such device. Raises InputError on an unknown one."""
        if device not in DEVICES:
            raise InputError(f"no peak is known for '{device}'", fix=nearest(device, DEVICES))
        return self.operations / (DEVICES[device] * UTILISATION) / 3600

    def seconds(self, device: str) -> float:
        """Of one device and one core in turn."""
        return 3600 * self.gpu_hours(device) + self.core_s


def costs(plan: Plan) -> dict[str, Cost]:
    """The cost of every job. Sizes that cannot be counted (a model that is not known here) count as nothing."""
    return {one: _cost(plan, job) for one, job in plan.jobs.items()}


def _cost(plan: Plan, job: Job) -> Cost:
    if job.config is not None:
        samples = job.config.max_steps * job.config.batch_size
        parameters, tokens = _counted(_root(plan, job), job.config.image_size)
        return Cost(6.0 * parameters * tokens * samples, 0.0, samples)
    if job.kind == "evaluate":
        limits = _limits(job.spec["protocol"])
        steps = job.amount * sum(limits[task] for task in job.spec["tasks"] or limits)
        core_s = steps * next((s for name, s in SIMULATOR_S.items() if job.spec["protocol"].startswith(name)), 0.0)
        trained = plan.jobs[job.needs["model"]] if "model" in job.needs else None
        if trained is None or trained.config is None:
            return Cost(0.0, core_s, 0)
        parameters, tokens = _counted(_root(plan, trained), trained.config.image_size)
        looks = steps // (job.spec["execute"] or trained.config.chunk)
        return Cost(2.0 * parameters * tokens * looks, core_s, looks)
    return Cost()


def _root(plan: Plan, job: Job) -> str:
    """The model that a training's chain starts from: its path, hub id or `tiny`."""
    while "backbone" in job.needs:
        job = plan.jobs[job.needs["backbone"]]
    return job.given.get("backbone", "tiny")


@lru_cache
def _counted(source: str, image_size: int | None) -> tuple[float, int]:
    """Parameters that a token meets, and tokens per sample."""
    if source == "tiny":
        return 0.3e6, 20 + PROMPT_TOKENS
    from vlm4vla_core.sizes import size_of

    try:
        size = size_of(source, image_size=image_size)
    except (InputError, OSError):  # a hub id that is not known here and cannot be asked for
        return 0.0, 0
    return float(size.headless - size.idle + size.new), size.image_tokens + PROMPT_TOKENS


def _limits(protocol: str) -> dict[str, int]:
    from vlm4vla_core.sims import benchmark

    return dict(benchmark(protocol).step_limits)


def remaining(plan: Plan, status: Status, jobs: Iterable[str], device: str) -> float:
    """Seconds that these jobs would take one after the other, corrected by what has been measured.

    The correction is the median over done jobs of a kind of measured over estimated seconds; a kind without an
    estimate takes the median of its measured seconds.
    """
    estimates = costs(plan)
    total = 0.0
    wanted = list(jobs)
    for kind in {plan.jobs[one].kind for one in wanted}:
        done = [one for one, state in status.states.items() if state.state == "done" and plan.jobs[one].kind == kind]
        ratios = [
            status.states[one].seconds / estimates[one].seconds(device)
            for one in done
            if estimates[one].seconds(device) > 0
        ]
        factor = median(ratios) if ratios else 1.0
        flat = median(status.states[one].seconds for one in done) if done and not ratios else 0.0
        mine = [one for one in wanted if plan.jobs[one].kind == kind]
        total += sum(flat or factor * estimates[one].seconds(device) for one in mine)
    return total
