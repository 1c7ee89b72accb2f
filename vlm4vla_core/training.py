"""One training loop for both objectives, exact to the bit: a killed run goes on as if nothing had happened.

A batch is a pure function of (seed, step), a checkpoint holds weights and optimizer, and nothing else is state. Both
objectives start from the same weights for the same seed.

RUN/run.json (settings), RUN/log.jsonl, RUN/checkpoints/step-000000 (the start, kept) … step-NNNNNN (the last).

Trap: exactness holds for one machine, library version and number of threads; another order of summation is another
run in the last digits.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.episodes.sampling import action_chunks, batch_rows, split_episodes
from vlm4vla_core.episodes.store import REMAKE, EpisodeStore
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.progress import progress

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.options import BackboneOptions

__all__ = ["TrainConfig", "train", "up_to_date"]


# --- what needs no torch --------------------------------------------------------------------------------


def run_inputs(config: TrainConfig, data: Path) -> dict[str, str]:
    """Fingerprints of what a run is made from: its data and, where given, its backbone. Raises InputError."""
    store = folders.read_manifest(data, "episodes", name=folders.STORE_MANIFEST, fix=REMAKE)
    inputs = {"data": store["fingerprint"]}
    if config.backbone != "tiny":
        inputs["backbone"] = _backbone_fingerprint(config.backbone)
    return inputs


def _backbone_fingerprint(path: str) -> str:
    folder = Path(path)
    if checkpoint.looks_like_one(folder):
        return str(folders.read_manifest(checkpoint.resolve(folder), checkpoint.KIND)["fingerprint"])
    if folder.is_dir():  # weights of many gigabytes: names and sizes, and the content of what is small
        parts = {
            file.name: file.stat().st_size if file.stat().st_size > 1 << 24 else folders.file_fingerprint(file)
            for file in sorted(folder.iterdir())
            if file.is_file()
        }
        return folders.fingerprint(parts)
    return path  # a hub id


def up_to_date(config: TrainConfig, data: Path, out: Path) -> Path | None:
    """The last checkpoint of a run that is finished and unchanged, else None. Raises InputError on missing inputs."""
    last = checkpoint.step_folder(out, config.max_steps)
    inputs = run_inputs(config, data)
    return last if folders.current(last, checkpoint.KIND, config=config.identity(), inputs=inputs) else None


def _refuse_changes(out: Path, identity: dict[str, Any], inputs: dict[str, str]) -> None:
    """Raise InputError saying what changed, when `out` holds a run with other settings or data."""
    if not (out / "run.json").exists():
        if out.exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise InputError("this folder exists and holds no run", where=out, fix="give a new --out")
        return
    run = folders.read_json(out / "run.json")
    old, new = {**run["identity"], **run["inputs"]}, {**identity, **inputs}
    changes = [
        f"{key} was {old.get(key)}, is now {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    if changes:
        raise InputError(
            f"this folder holds a run with other settings or data: {'; '.join(changes)}",
            where=out,
            fix="give another --out, or remove it",
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the run folder's lock, which the system drops when the process ends, however it ends.

    A folder in which nothing came to be is taken away again.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError("another process is training in this folder", where=out, fix="wait for it") from None
        try:
            yield
        finally:
            if [path.name for path in out.iterdir()] == [".lock"]:
                shutil.rmtree(out)


# --- the objectives -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the loop needs of an objective.

    model: what is trained and saved. batch: rows and a generator -> model inputs. loss: inputs -> scalars, "loss" first
    of all. evaluate: rows -> named numbers over those rows.
    """

    model: Any
    batch: Callable[[np.ndarray, np.random.Generator], Any]
    loss: Callable[[Any], dict[str, torch.Tensor]]
    evaluate: Callable[[np.ndarray], dict[str, Any]]


def action_task(config: TrainConfig, store: EpisodeStore, backbone: Backbone, camera: str) -> Task:
    """The VLA objective: chunks of actions at the query."""
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    stats = store.stats["action"]
    policy = VLAPolicy(
        backbone,
        PolicyConfig(
            chunk=config.chunk,
            convention=store.convention,
            q01=stats["q01"],
            q99=stats["q99"],
            camera=camera,
            width=config.head_width,
            head=config.head,
            arm_loss=config.arm_loss,
            huber_delta=config.huber_delta,
            gripper_weight=config.gripper_weight,
            flow_steps=config.flow_steps,
            pad_to=config.pad_to,
            normalisation=config.normalisation,
            clip=config.clip_actions,
        ),
        seed=config.seed,
    )
    if config.compile:
        policy.compile_layers()
    instructions = store.instructions

    def batch(rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        chunks, mask = action_chunks(store.action, store.episode_of, rows, config.chunk)
        texts = [instructions[store.episode_of[row]] for row in rows]
        return policy.collate(store.images(camera, rows, backbone.image_size), texts, chunks, mask, rng)

    def evaluate(rows: np.ndarray) -> dict[str, Any]:
        from vlm4vla_core.validation import action_metrics

        return action_metrics(policy, store, rows, batch)

    return Task(policy, batch, policy, evaluate)


def language_task(config: TrainConfig, store: EpisodeStore, backbone: Backbone, camera: str) -> Task:
    """The VLM objective: next-token loss on answers to questions about the scene."""
    from torch.nn.functional import cross_entropy

    from vlm4vla_core.vqa import questions

    def batch(rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        asked = [questions(store, int(row), rng) for row in rows]
        pictures = store.images(camera, rows, backbone.image_size)
        return backbone.collate_answers(pictures, [q.question for q in asked], [q.answer for q in asked])

    def loss(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits, targets = backbone.answer_logits(inputs)
        return {"loss": cross_entropy(logits, targets)}

    def evaluate(rows: np.ndarray) -> dict[str, Any]:
        from vlm4vla_core.validation import language_metrics

        return language_metrics(backbone, rows, batch)

    return Task(backbone, batch, loss, evaluate)


def _start(config: TrainConfig) -> Backbone:
    """The backbone a run starts from, with what is frozen marked and adapters in place."""
    from vlm4vla_core.backbone import load_backbone, tiny
    from vlm4vla_core.freezing import freeze
    from vlm4vla_core.lora import add_lora

    if config.backbone == "tiny":
        backbone = tiny(
            config.family, seed=config.seed, image_size=config.image_size or 112, options=config.options(),
            language_head=config.objective == "language",
        )  # fmt: skip
    else:
        options: BackboneOptions | None = config.options()
        if checkpoint.looks_like_one(Path(config.backbone)) and config.default_options():
            options = None  # it keeps its own
        backbone = load_backbone(
            config.backbone,
            init=config.init,
            scratch=config.scratch,
            seed=config.seed,
            options=options,
            image_size=config.image_size,
            language_head=config.objective == "language",
        )
    backbone.lineage["stages"] = [*backbone.lineage.get("stages", []), config.objective]
    if config.lora:
        add_lora(backbone, config.lora, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    freeze(backbone, config.freeze)
    return backbone


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then constant, or a cosine that reaches 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    part = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def _optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW; decay only on matrices (not on query, norms, biases or word embeddings)."""
    import torch

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = ("query", "embed_tokens.weight")
    decayed = [p for name, p in trained if p.ndim >= 2 and not name.endswith(plain)]
    others = [p for name, p in trained if p.ndim < 2 or name.endswith(plain)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], config.lr, config.betas, fused=True)


# --- the loop -------------------------------------------------------------------------------------------


def train(config: TrainConfig, data: Path | str, out: Path | str) -> Path:
    """Train as `config` says on the store `data`, in the run folder `out`; returns the last checkpoint's folder.

    An interrupted run goes on from its newest whole checkpoint, a finished one is left as it is. Actions are
    normalised by the quantiles of the whole store, held-out episodes included, as in OpenVLA.
    Raises InputError on bad data or settings, when `out` holds another run, when another process is training there,
    and when the loss stops being finite (the last good checkpoint stays).
    """
    data, out = Path(data), Path(out)
    if done := up_to_date(config, data, out):
        return done
    inputs, identity = run_inputs(config, data), config.identity()
    store = EpisodeStore.open(data)
    if len(bad := np.flatnonzero(~np.isfinite(store.action).all(1))):
        raise InputError(f"{len(bad)} actions are NaN or infinite, the first in row {bad[0]}", where=data, fix=REMAKE)
    camera = _camera(config, store)
    _refuse_changes(out, identity, inputs)  # before the lock, which would write into a folder that is no run
    with _locked(out), _threads(config.threads):
        _refuse_changes(out, identity, inputs)  # again: another process may have begun here meanwhile
        run = _Run(config, store, out, camera, inputs)
        with _stop_flag() as stop:
            return run.go(stop)


def _camera(config: TrainConfig, store: EpisodeStore) -> str:
    camera = config.camera or store.cameras[0]
    if camera not in store.cameras:
        raise InputError(f"the store has no camera '{camera}'", where=store.path, fix=nearest(camera, store.cameras))
    return camera


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """Torch's threads while training: as asked, else at most 2 (more slow small models down, many times under load)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or min(2, before, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event set by Ctrl-C, so that a step is finished and saved before the process leaves."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _Run:
    """One run in one folder: model, optimizer, rows, and the step it has reached."""

    def __init__(
        self, config: TrainConfig, store: EpisodeStore, out: Path, camera: str, inputs: dict[str, str]
    ) -> None:
        self.config, self.out, self.inputs, self.identity = config, out, inputs, config.identity()
        self.rows, held_out = split_episodes(store, config.val_fraction)
        spread = np.linspace(0, len(held_out) - 1, min(config.val_rows, len(held_out))).round().astype(int)
        self.val_rows = held_out[spread]
        make = action_task if config.objective == "action" else language_task
        self.task = make(config, store, _start(config), camera)
        self.model = self.task.model.train()
        self.optimizer = _optimizer(config, self.model)
        self.step = 0
        self.metrics: dict[str, Any] = {}
        if not (out / "run.json").exists():
            self._write_run(store, camera)

    def _write_run(self, store: EpisodeStore, camera: str) -> None:
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        new, share = self.model.new_parameters() if hasattr(self.model, "new_parameters") else (0, 0.0)
        folders.write_json(
            self.out / "run.json",
            {
                "format": "vlm4vla-run",
                "version": folders.FORMAT_VERSION,
                "config": self.config.model_dump(mode="json"),
                "identity": self.identity,
                "inputs": self.inputs,
                "data": {
                    "path": store.path,
                    "camera": camera,
                    "train_rows": len(self.rows),
                    "val_rows": len(self.val_rows),
                },
                "parameters": {"total": total, "trained": trained, "new": new, "new_share": share},
                "made_by": folders.provenance(),
            },
        )

    # --- checkpoints and log

    def _save(self) -> Path:
        folder = checkpoint.step_folder(self.out, self.step)
        checkpoint.save(
            folder, self.model, optimizer=self.optimizer, step=self.step,
            config=self.identity, inputs=self.inputs, metrics=self.metrics,
        )  # fmt: skip
        return folder

    def _resume(self) -> None:
        """Go back to the newest whole checkpoint, and cut the log to it; without one, save the start."""
        log = self.out / "log.jsonl"
        whole = [folder for folder in checkpoint.complete(self.out) if (folder / checkpoint.STATE).is_file()]
        if not whole:
            log.unlink(missing_ok=True)
            self._validate()
            self._save()
            return
        checkpoint.fill(self.model, whole[-1])
        self.step = checkpoint.restore_optimizer(whole[-1], self.model, self.optimizer)
        self.metrics = folders.read_manifest(whole[-1], checkpoint.KIND)["metrics"]
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole_lines = (line for line in lines if line.endswith("\n"))  # a kill may cut the last one short
        log.write_text("".join(line for line in whole_lines if json.loads(line)["step"] <= self.step))

    def _log(self, **values: Any) -> None:
        with (self.out / "log.jsonl").open("a") as handle:
            handle.write(json.dumps({"step": self.step, **values}) + "\n")

    def _validate(self) -> None:
        if not len(self.val_rows):
            return
        self.model.eval()
        self.metrics = self.task.evaluate(self.val_rows)
        self.model.train()
        self._log(validation=self.metrics)

    # --- steps

    def _prepare(self, step: int) -> tuple[np.ndarray, Any]:
        rows = batch_rows(self.rows, self.config.batch_size, self.config.seed, step)
        return rows, self.task.batch(rows, np.random.default_rng([self.config.seed, step]))

    def go(self, stop: threading.Event) -> Path:
        """Train to the last step, or to Ctrl-C (then saves and raises KeyboardInterrupt)."""
        self._resume()
        config, folder = self.config, checkpoint.step_folder(self.out, self.step)
        # The next batch is decoded while this one is computed; a batch depends on its step alone, so order is safe.
        with (
            ThreadPoolExecutor(1) as pool,
            progress(total=config.max_steps, what=f"train {config.objective}", unit="step") as bar,
        ):
            bar.initial = bar.n = self.step
            ahead = pool.submit(self._prepare, self.step)
            began, done_before = time.perf_counter(), self.step
            while self.step < config.max_steps:
                rows, batch = ahead.result()
                if self.step + 1 < config.max_steps:
                    ahead = pool.submit(self._prepare, self.step + 1)
                losses, norm, rate = self._update(rows, batch)
                self.step += 1
                bar.update(1)
                if self.step % config.log_every == 0 or self.step == config.max_steps:
                    bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
                    speed = (self.step - done_before) * config.batch_size / (time.perf_counter() - began)
                    self._log(**losses, lr=rate, grad_norm=norm, samples_per_s=round(speed, 1))
                last = self.step == config.max_steps
                if last or (config.val_every and self.step % config.val_every == 0):
                    self._validate()
                if last or stop.is_set() or (config.save_every and self.step % config.save_every == 0):
                    folder = self._save()
                if stop.is_set() and not last:
                    raise KeyboardInterrupt
        return folder

    def _update(self, rows: np.ndarray, batch: Any) -> tuple[dict[str, float], float, float]:
        """One optimizer step; returns the losses, the gradient norm before clipping, and the rate."""
        import torch

        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.task.loss(batch)
        losses = {name: float(value.detach()) for name, value in parts.items()}
        if not math.isfinite(losses["loss"]):
            self._diverged(f"the loss is {losses['loss']}", rows)
        parts["loss"].backward()
        limit = self.config.clip or math.inf
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            self._diverged(f"the gradient norm is {norm}", rows)
        self.optimizer.step()
        return losses, norm, rate

    def _diverged(self, what: str, rows: np.ndarray) -> None:
        shown = ", ".join(map(str, rows[:8])) + (" …" if len(rows) > 8 else "")
        whole = checkpoint.complete(self.out)
        raise InputError(
            f"{what} at step {self.step}, on rows {shown}",
            where=self.out,
            fix=f"lower the learning rate; the last good checkpoint is {whole[-1].name if whole else 'none'}",
        )
