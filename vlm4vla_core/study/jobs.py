"""From a declaration to jobs: each is one call of a verb, known by what decides its result.

A job's id is a fingerprint of its specification and of the ids of what it needs. So arms that share a stage share the
job, a new arm leaves all ids alone, and rows that ship with the project are recognised wherever they were made.

Trap: episodes are an amount, not part of the id: more of them extend the same rows. Tasks and execute length are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.actors import SAMPLING
from vlm4vla_core.errors import InputError
from vlm4vla_core.presets import DRAWN, TrainConfig, make_config
from vlm4vla_core.study.declare import Arm, Backbone, Benchmark, Study, chosen

PRODUCT = "product"  # folder of what the verb made, inside the job's
CONFIG = "config.toml"


@dataclass(frozen=True)
class Job:
    """One call of a verb.

    kind: record, train, evaluate, ask or probe. spec: what decides the result, as JSON. needs: role -> job id, and
    given: role -> path or name of what is there already. amount: episodes, 0 elsewhere. gpus: taken where
    there are any. config: of a training.
    """

    id: str
    kind: str
    name: str
    spec: dict[str, Any]
    needs: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    amount: int = 0
    gpus: int = 0
    config: TrainConfig | None = None

    @property
    def folder(self) -> str:
        """Name of its folder: readable first, unique at the end."""
        return f"{self.kind}-{self.name}-{self.id[:8]}"

    def command(self, jobs: Path, known: dict[str, Job]) -> list[str]:
        """The verb's words; jobs: the folder of all jobs; known: jobs by id."""
        product = jobs / self.folder / PRODUCT
        roles = dict(self.given) | {role: str(jobs / known[one].folder / PRODUCT) for role, one in self.needs.items()}
        if self.kind == "record":
            return ["record", self.spec["record"], *_flags(self.spec["options"]), "--out", str(product)]
        if self.kind == "train":
            words = ["train", str(jobs / self.folder / CONFIG), "--data", roles["data"], "--out", str(product)]
            return [*words, *(["--backbone", roles["backbone"]] if "backbone" in roles else [])]
        if self.kind == "probe":
            words = [self.spec["verb"], roles["model"], "--data", roles["data"], "--out", str(product)]
            return [*words, *_flags(self.spec["options"])]
        words = ["evaluate", roles["model"], "--benchmark", self.spec["protocol"], "--episodes", str(self.amount)]
        words += ["--out", str(product)]
        if self.spec.get("tasks"):
            words += ["--tasks", *self.spec["tasks"]]
        if self.spec.get("execute"):
            words += ["--execute", str(self.spec["execute"])]
        if "draw" in self.spec:
            words += ["--draw", str(self.spec["draw"])]
        return [*words, *(["--data", roles["data"]] if "data" in roles else [])]


def _flags(options: dict[str, Any]) -> list[str]:
    """`--key value…` of a table of options; true is a bare flag."""
    words = []
    for key, value in options.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def job_id(kind: str, spec: dict[str, Any], needs: dict[str, str]) -> str:
    """The fingerprint that a job is known by."""
    return folders.fingerprint({"kind": kind, "spec": spec, "needs": needs})


@dataclass(frozen=True)
class Cell:
    """One answer of a study: a policy in a benchmark. trainings: its jobs, first stage first. draw: number of the
    head's noise, where the episodes of another cell are run again with it."""

    arm: str
    backbone: str
    protocol: str
    seed: int
    execute: int | None
    trainings: tuple[str, ...]
    evaluation: str
    draw: int | None = None

    @property
    def name(self) -> str:
        tail = "" if self.draw is None else f"/draw{self.draw}"
        return f"{self.arm}/{self.backbone}/{self.protocol}/{self.seed}{tail}"


@dataclass
class Plan:
    """All jobs of a study in an order in which each comes after what it needs, and the cells that they answer.

    baselines: evaluation job -> policy's name. asked: ask job -> (backbone, stages before). probes: probe job ->
    (probe's name, arm, backbone, seed). fingerprints: of what is given, by its place.
    """

    study: Study
    jobs: dict[str, Job] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    baselines: dict[str, str] = field(default_factory=dict)
    asked: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    probes: dict[str, tuple[str, str, str, int]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str, spec: dict[str, Any], **more: Any) -> str:
        """Add a job, or find the one that is the same; returns its id."""
        needs = more.get("needs", {})
        spec = folders.as_json(spec)
        more.setdefault("gpus", 0 if kind == "record" else min(1, self.study.resources.train_gpus))
        made = Job(job_id(kind, spec, needs), kind, name, spec, **more)
        same = self.jobs.get(made.id)
        if same is None or same.amount < made.amount:
            self.jobs[made.id] = made
        return made.id

    def closure(self, wanted: Iterable[str]) -> set[str]:
        """These jobs and all that they need."""
        found: set[str] = set()
        stack = list(wanted)
        while stack:
            if (one := stack.pop()) not in found:
                found.add(one)
                stack += self.jobs[one].needs.values()
        return found

    def leaves(self) -> list[str]:
        """The jobs whose rows are the study's results."""
        cells = [cell.evaluation for cell in self.cells]
        return list(dict.fromkeys([*cells, *self.baselines, *self.asked, *self.probes]))


def expand(study: Study) -> Plan:
    """The plan of a study. Raises InputError on unknown protocols, presets, settings and backbones."""
    plan = Plan(study)
    stores = {entry.name: _data(plan, study, entry.name) for entry in study.data}
    for arm in study.arm:
        for backbone in _chosen(study.backbone, arm.backbones):
            for seed in arm.seeds:
                before = _earlier(plan, study, arm, backbone, seed, stores)
                for bench in _chosen(study.benchmark, arm.benchmarks, "protocol"):
                    _cells(plan, study, arm, backbone, seed, bench, before, stores)
    for bench in study.benchmark:
        for name in bench.baselines:
            role = stores[bench.data] if name == "mean-action" else {}
            spec = {"policy": name, **_protocol(bench.protocol), "tasks": bench.tasks, "execute": None}
            spec |= {"given": _given(plan, role)} if role else {}
            more = {"needs": role.get("needs", {}), "given": {"model": name, **role.get("given", {})}}
            job = plan.add("evaluate", f"{name}-{bench.protocol}", spec, amount=bench.episodes, **more)
            plan.baselines[job] = name
    _questions(plan, study)
    _probes(plan, study, stores)
    return plan


def _chosen(entries: tuple[Any, ...], names: tuple[str, ...], key: str = "name") -> list[Any]:
    return [entry for entry in entries if chosen(getattr(entry, key), names)]


def _data(plan: Plan, study: Study, name: str) -> dict[str, dict[str, str]]:
    """The role `data` of jobs that read this store."""
    entry = next(entry for entry in study.data if entry.name == name)
    if entry.store:
        store = study.folder / entry.store
        plan.fingerprints[str(store)] = store_fingerprint(store) or entry.fingerprint or f"missing {store.name}"
        return {"given": {"data": str(store)}}
    from vlm4vla_core.sims.tabletop import world

    version = _protocol(entry.world) if "@" in entry.world else {"world": world.VERSION}
    spec = {"record": entry.world, "options": entry.options, **version}
    return {"needs": {"data": plan.add("record", entry.name, spec)}}


def _train(
    plan: Plan, study: Study, name: str, preset: str, settings: dict[str, Any], store: dict[str, Any],
    start: dict[str, Any],
) -> str:  # fmt: skip
    """A training job. start: the role `backbone`, in `needs` or `given`."""
    base = study.folder / preset if preset.endswith(".toml") else preset
    config: TrainConfig = make_config(str(base), settings)
    more: dict[str, dict[str, str]] = {key: {**store.get(key, {}), **start.get(key, {})} for key in ("needs", "given")}
    # What is left at its default is not part of the id, or every new setting would disown all earlier rows.
    changed = set(config.model_dump(exclude_defaults=True))
    settings = {key: value for key, value in config.identity().items() if key in changed}
    spec = {"settings": settings, "given": _given(plan, more)}
    return plan.add("train", name, spec, **more, config=config, gpus=study.resources.train_gpus)


def _given(plan: Plan, role: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of what is given rather than made by a job."""
    from vlm4vla_core.run_folder import backbone_fingerprint

    found = {}
    for name, where in role.get("given", {}).items():
        if where not in plan.fingerprints:
            plan.fingerprints[where] = backbone_fingerprint(where)
        found[name] = plan.fingerprints[where]
    return found


def store_fingerprint(store: Path) -> str:
    """Fingerprint of a store or of question files, empty where there are none."""
    from vlm4vla_core.run_folder import data_fingerprint

    try:
        return data_fingerprint(store)
    except InputError:
        return ""


def _source(study: Study, backbone: Backbone) -> dict[str, Any]:
    """The role `backbone`: nothing for one drawn from a seed, else a path or hub id. Raises InputError when missing."""
    if backbone.source in DRAWN:
        return {}
    beside = study.folder / backbone.source
    if beside.exists():
        return {"given": {"backbone": str(beside)}}
    if backbone.source.startswith(("data/", "./", "../", "/")):
        return {"given": {"backbone": str(folders.shipped(backbone.source))}}
    return {"given": {"backbone": backbone.source}}


def _earlier(
    plan: Plan, study: Study, arm: Arm, backbone: Backbone, seed: int, stores: dict[str, Any]
) -> tuple[str, ...]:
    """Jobs of the stages before the last one."""
    made: list[str] = []
    for name in arm.stages:
        stage = next(stage for stage in study.stage if stage.name == name)
        start = {"needs": {"backbone": made[-1]}} if made else _source(study, backbone)
        one = seed if stage.seed is None else stage.seed
        settings = {**stage.set, **backbone.set, **_own(study, arm, backbone, one, first=not made)}
        title = f"{'+'.join(arm.stages[: len(made) + 1])}-{backbone.name}-{one}"
        made.append(_train(plan, study, title, stage.preset, settings, stores[stage.data], start))
    return tuple(made)


def _own(study: Study, arm: Arm, backbone: Backbone, seed: int, *, first: bool) -> dict[str, Any]:
    """The settings that the study decides; the backbone's source says which family it is."""
    source = _source(study, backbone).get("given", {}).get("backbone", backbone.source)
    return {"seed": seed, "backbone": source, **({"init": arm.init} if first else {})}


def _cells(
    plan: Plan, study: Study, arm: Arm, backbone: Backbone, seed: int, bench: Benchmark, before: tuple[str, ...],
    stores: dict[str, Any],
) -> None:  # fmt: skip
    """The last stage for a benchmark, and its evaluations."""
    start = {"needs": {"backbone": before[-1]}} if before else _source(study, backbone)
    settings = {**bench.set, **backbone.set, **arm.set, **_own(study, arm, backbone, seed, first=not before)}
    name = f"{arm.name}-{backbone.name}-{bench.protocol}-{seed}"
    last = _train(plan, study, name, bench.preset, settings, stores[bench.data], start)
    head = plan.jobs[last].config.head  # type: ignore[union-attr]
    if arm.draws and head not in SAMPLING:
        what = f"arm '{arm.name}' asks for draws, and its head '{head}' draws nothing"
        raise InputError(what, fix='set = { head = "flow" }, or leave draws out')
    for execute, draw in product(bench.execute or (None,), (None, *dict.fromkeys(arm.draws))):
        spec = {**_protocol(bench.protocol), "tasks": bench.tasks, "execute": execute}
        spec |= {} if draw is None else {"draw": draw}
        title = name if draw is None else f"{name}-draw{draw}"
        job = plan.add("evaluate", title, spec, needs={"model": last}, amount=bench.episodes)
        plan.cells.append(Cell(arm.name, backbone.name, bench.protocol, seed, execute, (*before, last), job, draw))


def _protocol(name: str) -> dict[str, Any]:
    """What decides a protocol's outcomes: its name with version, and the built-in world's. Raises InputError."""
    from vlm4vla_core.sims import benchmark
    from vlm4vla_core.sims.tabletop import world
    from vlm4vla_core.vqa.benchmark import BENCH

    if name != BENCH.protocol:
        benchmark(name)
    return {"protocol": name, **({"world": world.VERSION} if name.startswith("tabletop") else {})}


def _questions(plan: Plan, study: Study) -> None:
    """Ask jobs: of the backbones as they come, and after earlier stages (each once)."""
    for entry in study.capability:
        protocol = _protocol(entry.protocol)
        for backbone in study.backbone if "backbone" in entry.of else ():
            role = _source(study, backbone)
            if not role:
                continue  # a tiny one exists in training only
            given = {"model": role["given"]["backbone"]}
            spec = {**protocol, "given": _given(plan, role)}
            job = plan.add("ask", f"{backbone.name}-{entry.protocol}", spec, given=given, amount=entry.episodes)
            plan.asked[job] = (backbone.name, ())
        if "stages" not in entry.of:
            continue
        stages = {arm.name: arm.stages for arm in study.arm}
        for cell in plan.cells:
            for number, training in enumerate(cell.trainings[:-1], 1):
                name = f"{plan.jobs[training].name}-{entry.protocol}"
                job = plan.add("ask", name, protocol, needs={"model": training}, amount=entry.episodes)
                plan.asked[job] = (cell.backbone, stages[cell.arm][:number])


def _probes(plan: Plan, study: Study, stores: dict[str, Any]) -> None:
    """Probe jobs: of backbones, and of the policies of some arms and seeds."""
    for probe in study.probe:
        store = stores[probe.data]
        spec = {"verb": probe.verb, "options": probe.options}
        for backbone in study.backbone if "backbone" in probe.of else ():
            if role := _source(study, backbone):
                given = {"model": role["given"]["backbone"], **store.get("given", {})}
                full = {**spec, "given": _given(plan, {"given": {**role["given"], **store.get("given", {})}})}
                name = f"{probe.name}-{backbone.name}"
                job = plan.add("probe", name, full, needs=store.get("needs", {}), given=given)
                plan.probes[job] = (probe.name, "backbone", backbone.name, 0)
        for cell in plan.cells if "policy" in probe.of else ():
            if cell.seed in probe.seeds and chosen(cell.arm, probe.arms):
                needs = {"model": cell.trainings[-1], **store.get("needs", {})}
                name = f"{probe.name}-{plan.jobs[cell.trainings[-1]].name}"
                full = {**spec, "given": _given(plan, store)}
                job = plan.add("probe", name, full, needs=needs, given=store.get("given", {}))
                plan.probes[job] = (probe.name, cell.arm, cell.backbone, cell.seed)


def write_toml(path: Path, config: TrainConfig) -> None:
    """A training's settings as TOML, but for a backbone that is given. JSON's values are TOML's, tables aside."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {text(one)}" for key, one in value.items()) + "}"
        return json.dumps(value)

    settings = folders.as_json(
        config.model_dump(exclude_defaults=True, exclude=set() if config.backbone in DRAWN else {"backbone"})
    )
    path.write_text("".join(f"{key} = {text(value)}\n" for key, value in settings.items()), encoding="utf-8")
