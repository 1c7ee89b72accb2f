"""What a study would cost, before it is paid for: operations of trainings and policies, core-seconds of simulators.

A training step takes 6 operations per parameter and token (forward 2, backward 4; Kaplan et al. 2020, section 2.1), 2
fewer for a frozen parameter that gradients still pass through, 4 fewer where none pass (a frozen vision tower); a
prediction takes 2. The vision tower meets the picture's patches of 14 pixels, the decoder the image tokens and the
words, word embeddings nothing.

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

PROMPT_TOKENS = 24  # of one instruction or question with its answer, beside the image's
UTILISATION = 0.4  # share of the peak that trainings of models of billions reach
# Peak dense bf16 operations per second as the makers state them. A core: what nano models reached in fp32 on one thread
# (0.20 s a step of 32 with paligemma-s, 0.115 s with smolvlm-xs, CPU time), over UTILISATION.
DEVICES = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "rtx4090": 165e12, "cpu-core": 95e9}
# Core-seconds of a simulator's step with its pictures, measured on one CPU core (docs/simulators.md).
SIMULATOR_S = {"tabletop": 0.0005, "libero": 0.13, "simpler": 0.19, "calvin": 0.05}
START_S = 10.0  # of a process: libraries, model, and a first look at the held-out rows
RECORD_S = 0.02  # of a tabletop demonstration
PATCH = 14


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
        config = job.config
        samples = config.max_steps * config.batch_size
        words = PROMPT_TOKENS * (config.questions_per_picture if config.objective == "language" else 1)
        still: dict[str, float] = {part: 2.0 if part in ("vision", "projector") else 4.0 for part in config.freeze}
        if config.cache_features:
            still |= dict.fromkeys(("vision", "projector"), 0.0)
        if config.objective == "dense" and not config.auxiliary:
            still |= {"decoder": 0.0}  # it takes no part
        met = _counted(_root(plan, job), config.image_size, words)
        return Cost(samples * sum(still.get(part, 6.0) * count for part, count in met.items()), START_S, samples)
    if job.kind == "evaluate":
        limits = _limits(job.spec["protocol"])
        steps = job.amount * sum(limits[task] for task in job.spec["tasks"] or limits)
        core_s = steps * next((s for name, s in SIMULATOR_S.items() if job.spec["protocol"].startswith(name)), 0.0)
        trained = plan.jobs[job.needs["model"]] if "model" in job.needs else None
        if trained is None or trained.config is None:
            return Cost(0.0, core_s + START_S / 2, 0)
        met = _counted(_root(plan, trained), trained.config.image_size, PROMPT_TOKENS)
        looks = steps // (job.spec["execute"] or trained.config.chunk)
        return Cost(2.0 * sum(met.values()) * looks, core_s + START_S, looks)
    if job.kind == "ask":
        source = _root(plan, plan.jobs[job.needs["model"]]) if "model" in job.needs else job.given["model"]
        asked = job.amount * _KINDS
        return Cost(2.0 * sum(_counted(source, None, PROMPT_TOKENS).values()) * asked, START_S, asked)
    if job.kind == "record" and job.spec["record"] == "tabletop":
        episodes = int(job.spec["options"].get("episodes", 0))
        return Cost(0.0, START_S / 2 + RECORD_S * episodes, episodes)
    return Cost()


_KINDS = 8  # of questions of tabletop-vqa@1


def _root(plan: Plan, job: Job) -> str:
    """The model that a training's chain starts from: its path, hub id, `tiny`, or `nano FAMILY SIZE`."""
    while "backbone" in job.needs:
        job = plan.jobs[job.needs["backbone"]]
    if "backbone" in job.given:
        return job.given["backbone"]
    return f"nano {job.config.family} {job.config.size}" if job.config and job.config.backbone == "nano" else "tiny"


@lru_cache
def _counted(source: str, image_size: int | None, words: int) -> dict[str, float]:
    """Part -> parameters times tokens that meet them, per sample; nothing for a model that cannot be counted."""
    if source == "tiny":
        return {"decoder": 0.3e6 * (20 + words)}
    from vlm4vla_core.sizes import size_of

    if source.startswith("nano "):
        _, family, scale = source.split()
        tokens = 64 if scale != "xs" or family == "paligemma" else 16
        wide = {"xs": 1.0, "s": 1.0, "m": 2.4, "l": 6.0}[scale]
        return {"vision": wide * 0.125e6 * 64, "decoder": wide * 0.36e6 * (tokens + words)}
    try:
        size = size_of(source, image_size=image_size)
    except (InputError, OSError):  # a hub id that is not known here and cannot be asked for
        return {}
    text = size.image_tokens + words
    met = {part: float(count) * text for part, count in size.parts.items() if part != "word_embeddings"}
    met["vision"] = float(size.parts.get("vision", 0)) * (size.image_size // PATCH) ** 2
    met["decoder"] = (size.parts.get("decoder", 0) - size.idle) * text
    return met


def _limits(protocol: str) -> dict[str, int]:
    from vlm4vla_core.sims import benchmark

    return dict(benchmark(protocol).step_limits)


def remaining(
    plan: Plan, status: Status, jobs: Iterable[str], device: str, prices: dict[str, Cost] | None = None
) -> float:  # fmt: skip
    """Seconds that these jobs would take one after the other, corrected by what has been measured.

    prices: of `costs`, where they are known.

    The correction is the median over done jobs of a kind of measured over estimated seconds; a kind without an
    estimate takes the median of its measured seconds.
    """
    estimates = prices or costs(plan)
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
