"""One training loop for all objectives, exact to the bit: a killed run goes on as if nothing had happened.

A batch is a pure function of (seed, step), a checkpoint holds weights and optimizer, and nothing else is state. All
objectives start from the same weights for the same seed. Under torchrun the processes share every batch.

Trap: exactness holds for one machine, library version and number of threads and processes; another order of summation
is another run in the last digits.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import checkpoint, folders, trajectory
from vlm4vla_core.devices import Devices
from vlm4vla_core.episodes.sampling import rank_slice
from vlm4vla_core.errors import InputError
from vlm4vla_core.objectives import build, losses_module
from vlm4vla_core.optimisers import average, averaged, learning_rate, make_optimizer, set_rates
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.progress import progress
from vlm4vla_core.run_folder import (
    STOPPED,
    finished,
    locked,
    open_trackers,
    prune,
    read_log,
    refuse_changes,
    run_inputs,
)
from vlm4vla_core.training_data import Data, Draw

__all__ = ["TrainConfig", "learning_rate", "train", "up_to_date"]


def up_to_date(config: TrainConfig, data: Path | str | Sequence[Path], out: Path) -> Path | None:
    """The last checkpoint of a run that is finished and unchanged, else None. Raises InputError on missing inputs."""
    return finished(config, run_inputs(config, _paths(data)), Path(out))


def train(config: TrainConfig, data: Path | str | Sequence[Path], out: Path | str) -> Path:
    """Train as `config` says on one store or several, in the run folder `out`; returns the last checkpoint's folder.

    An interrupted run goes on from its newest whole checkpoint, a finished one is left as it is. Actions are
    normalised by the quantiles of all stores together, held-out episodes included, as in OpenVLA.
    Raises InputError on bad data or settings, when `out` holds another run, when another process is training there,
    when memory does not suffice, and when the loss stops being finite (the last good checkpoint stays).
    """
    paths, out = _paths(data), Path(out)
    inputs, identity = run_inputs(config, paths), config.identity()
    if done := finished(config, inputs, out):
        return done
    opened = Data(config, paths)
    refuse_changes(out, identity, inputs)  # before the lock, which would write into a folder that is no run
    devices = Devices(config.device)
    try:
        with locked(out) if devices.first else nullcontext(), _threads(config.threads):
            refuse_changes(out, identity, inputs)  # again: another process may have begun here meanwhile
            run = _Run(config, opened, out, inputs, devices)
            with _stop_flag() as stop:
                return run.go(stop)
    finally:
        devices.close()


def _paths(data: Path | str | Sequence[Path]) -> list[Path]:
    return [Path(data)] if isinstance(data, Path | str) else [Path(one) for one in data]


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
    """One run in one folder: model, optimizer, data, and the step it has reached."""

    def __init__(self, config: TrainConfig, data: Data, out: Path, inputs: dict[str, str], devices: Devices) -> None:
        import torch

        self.config, self.data, self.out, self.inputs, self.devices = config, data, out, inputs, devices
        self.identity, self.step = config.identity(), 0
        self.metrics: dict[str, Any] = {}
        self.history: list[tuple[float, int]] = []  # held-out loss and step of every validation
        self.places = _places(config, devices)
        self.model, self.objectives = build(config, data, inputs)
        self.model.to(devices.device).train()
        self.backbone = getattr(self.model, "backbone", self.model)
        if config.precision == "bf16":
            base = self.backbone.base  # query, head and losses stay outside
            for name in ("forward", "get_image_features"):
                setattr(base, name, torch.autocast(devices.device.type, torch.bfloat16)(getattr(base, name)))
        if config.checkpoint_activations:
            self.backbone.checkpoint_activations()
        self.optimizer = make_optimizer(config, self.model)
        self.losses = devices.share(losses_module(self.model, self.objectives))
        self.trackers = open_trackers(config.trackers, out) if devices.first else []
        if devices.first and not (out / "run.json").exists():
            self._write_run()

    def _write_run(self) -> None:
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        new, share = self.model.new_parameters() if hasattr(self.model, "new_parameters") else (0, 0.0)
        mixture = self.data.mixture
        folders.write_json(
            self.out / "run.json",
            {
                "format": "vlm4vla-run",
                "version": folders.FORMAT_VERSION,
                "config": self.config.model_dump(mode="json"),
                "identity": self.identity,
                "inputs": self.inputs,
                "data": {
                    "path": [store.path for store in self.data.stores],
                    "camera": self.data.cameras,
                    "weights": mixture.weights,
                    "train_rows": sum(map(len, mixture.train)),
                    "val_rows": len(self.data.val.rows),
                    "dropped_val_episodes": mixture.dropped,
                    "cut": self.data.cut(),
                },
                "parameters": {"total": total, "trained": trained, "new": new, "new_share": share},
                "devices": {"processes": self.devices.world, "device": self.devices.device.type},
                "made_by": folders.provenance(),
            },
        )

    # --- checkpoints and log

    def _save(self) -> Path:
        folder = checkpoint.step_folder(self.out, self.step)
        if self.devices.first:
            files = {name: value for one in self.objectives.values() for name, value in one.files.items()}
            about: dict[str, Any] = {
                "step": self.step, "config": self.identity, "inputs": self.inputs, "metrics": self.metrics,
                "files": files,
            }  # fmt: skip
            checkpoint.save(folder, self.model, optimizer=self.optimizer, **about)
            if self.config.ema and self.step == self.config.max_steps:
                with averaged(self.optimizer):
                    checkpoint.save(self.out / "ema" / folder.name, self.model, **about)
            if self.config.keep_last:
                prune(self.out, self.config.keep_last, min(self.history)[1] if self.history else None)
        return folder

    def _resume(self) -> None:
        """Go back to the newest whole checkpoint, and cut the log to it; without one, save the start."""
        log, devices = self.out / "log.jsonl", self.devices
        if devices.first:
            whole = [folder for folder in checkpoint.complete(self.out) if (folder / checkpoint.STATE).is_file()]
            if not whole:
                log.unlink(missing_ok=True)
                self._validate()
                self._snapshot(None)
                whole = [self._save()]
                (reached,) = devices.sum([0.0])
            else:
                (reached,) = devices.sum([float(whole[-1].name.removeprefix("step-"))])
        else:
            (reached,) = devices.sum([0.0])  # all follow the first
        folder = checkpoint.step_folder(self.out, int(reached))
        if reached:
            checkpoint.fill(self.model, folder, "" if self.backbone is not self.model else "backbone.")
            self.step = checkpoint.restore_optimizer(folder, self.model, self.optimizer)
        self.metrics = folders.read_manifest(folder, checkpoint.KIND)["metrics"]
        lines = read_log(self.out, self.step)
        self.history = [(line["validation"]["loss"], line["step"]) for line in lines if "validation" in line]
        if devices.first:
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        devices.wait()

    def _log(self, **values: Any) -> None:
        if not self.devices.first:
            return
        with (self.out / "log.jsonl").open("a") as handle:
            handle.write(json.dumps({"step": self.step, **values}) + "\n")
        flat = {name: value for name, value in values.items() if isinstance(value, float)}
        for tracker in self.trackers:
            tracker.log(flat, step=self.step)

    def _validate(self) -> None:
        """Measure the main objective on held-out rows; the first process does, and tells the others the loss."""
        if not len(self.data.val.rows):
            return
        if self.devices.first:
            self.model.eval()
            self.metrics = self._measure()
            if self.config.ema and self.step:
                with averaged(self.optimizer):
                    self.metrics = {**self.metrics, "ema_loss": self._measure()["loss"]}
            self.model.train()
            self._log(validation=self.metrics)
        loss = self.metrics["loss"] if self.devices.first else 0.0
        if self.step:  # before the first step the others are not listening yet
            (loss,) = self.devices.sum([loss])
        self.history.append((loss, self.step))

    def _measure(self) -> dict[str, Any]:
        objective, data, size = self.objectives[self.config.objective], self.data, self.backbone.image_size

        def batch(places: slice, rng: np.random.Generator) -> Any:
            mine = data.val.part(places)
            return objective.make(data.images(mine, size), mine, rng, slice(None))

        return objective.evaluate(batch, len(data.val.rows))

    def _snapshot(self, norms: dict[str, float] | None) -> None:
        if self.config.snapshots == "none" or not self.devices.first or not trajectory.due(self.step):
            return
        folder = self.out / "trajectory" / f"step-{self.step:06d}"
        trajectory.record(folder, self.model, weights=self.config.snapshots == "weights")
        self._log(**({"gradient_norms": norms} if norms else {}), snapshot=folder.name)

    # --- steps

    def _prepare(self, step: int) -> tuple[Draw, list[dict[str, Any]]]:
        """The global draw of a step, and the inputs of each objective for each of this process's parts of it."""
        draw, made, data, size = self.data.batch(step), [], self.data, self.backbone.image_size
        for part in self.places:
            mine = draw.part(part)
            if self.config.skip_corrupt:
                mine = data.readable(mine, size)
                draw.which[part], draw.rows[part] = mine
            images = data.augmented(data.images(mine, size), step, part.start)
            made.append({
                name: objective.make(images, draw, np.random.default_rng([self.config.seed, step, *key]), part)
                for key, (name, objective) in zip(_KEYS, self.objectives.items(), strict=False)
            })  # fmt: skip
        return draw, made

    def go(self, stop: threading.Event) -> Path:
        """Train to the last step, or to Ctrl-C (then saves and raises KeyboardInterrupt)."""
        self._resume()
        config, folder = self.config, checkpoint.step_folder(self.out, self.step)
        # Further batches are prepared while one is computed; a batch depends on its step alone, so order is safe.
        with (
            ThreadPoolExecutor(config.workers) as pool,
            progress(total=config.max_steps, what=f"train {config.objective}", unit="step") as bar,
        ):
            bar.initial = bar.n = self.step
            coming = iter(range(self.step, config.max_steps))
            ahead = deque(pool.submit(self._prepare, step) for step in islice(coming, config.workers))
            began, done_before, waited, over = time.perf_counter(), self.step, 0.0, False
            while self.step < config.max_steps and not over:
                asked = time.perf_counter()
                draw, parts = ahead.popleft().result()
                waited += time.perf_counter() - asked
                ahead.extend(pool.submit(self._prepare, step) for step in islice(coming, 1))
                losses, norm, rate = self._update(draw, parts)
                self.step += 1
                bar.update(1)
                (stopping,) = self.devices.sum([float(stop.is_set())])
                last = self.step == config.max_steps
                if self.step % config.log_every == 0 or last:
                    bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
                    taken = time.perf_counter() - began
                    speed = (self.step - done_before) * config.batch_size / taken
                    self._log(
                        **losses, lr=rate, grad_norm=norm, samples_per_s=round(speed, 1),
                        waiting=round(waited / taken, 4), memory_gb=round(self.devices.memory_gb(), 3),
                        **({"skipped": self.data.skipped} if config.skip_corrupt else {}),
                    )  # fmt: skip
                best = False
                if last or (config.val_every and self.step % config.val_every == 0):
                    self._validate()
                    best = bool(self.history) and min(self.history)[1] == self.step
                    over = self._no_better()
                wanted = config.save_every and self.step % config.save_every == 0
                if last or over or stopping or wanted or (best and config.keep_last):
                    folder = self._save()
                if over and not last and self.devices.first:
                    folders.write_json(self.out / STOPPED, {"step": self.step, "why": f"patience {config.patience}"})
                if stopping and not last:
                    raise KeyboardInterrupt
            for tracker in self.trackers:
                tracker.finish()
            for future in ahead:
                future.cancel()
        self.devices.wait()
        return folder

    def _no_better(self) -> bool:
        """Whether the last `patience` validations were all no better than the best one before."""
        patience = self.config.patience
        losses = [loss for loss, step in self.history if step]
        return bool(patience) and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])

    def _update(self, draw: Draw, parts: list[dict[str, Any]]) -> tuple[dict[str, float], float, float]:
        """One optimizer step; returns the losses, the gradient norm before clipping, and the rate."""
        import torch

        rate = set_rates(self.config, self.optimizer, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        drawn = self.devices.randomness([self.config.seed, self.step]) if self.config.dropout else nullcontext()
        with drawn:
            try:
                losses = self._backward(parts)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                    raise self._too_large() from error
                raise
        if not math.isfinite(losses["loss"]):
            self._diverged(f"the loss is {losses['loss']}", draw)
        snapshot = self.config.snapshots != "none" and trajectory.due(self.step + 1)
        norms = trajectory.gradient_norms(self.model) if snapshot else None
        limit = self.config.clip or math.inf
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            self._diverged(f"the gradient norm is {norm}", draw)
        self.optimizer.step()
        if self.config.ema:
            average(self.optimizer, self.config.ema)
        if snapshot:
            self.step += 1
            self._snapshot(norms)
            self.step -= 1
        return losses, norm, rate

    def _backward(self, parts: list[dict[str, Any]]) -> dict[str, float]:
        """Gradients of the global batch's loss: parts weighted by what they are means of. Returns its losses."""
        names, weights, world = list(self.objectives), self.config.objectives(), self.devices.world
        counts = [[self.objectives[name].count(part[name]) for name in names] for part in parts]
        totals = self.devices.sum([float(sum(column)) for column in zip(*counts, strict=True)])
        values: dict[str, float] = {}
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            with self.devices.local(self.losses, wait=number + 1 < len(parts)):
                found = self.losses(part)
                total: Any = 0
                for name, own, whole in zip(names, count, totals, strict=True):
                    share = own / whole
                    total = total + found[name]["loss"] * (weights[name] * share * world)
                    for key, value in found[name].items():
                        label = key if name == names[0] else name if key == "loss" else f"{name}_{key}"
                        values[label] = values.get(label, 0.0) + float(value.detach()) * share
                total.backward()
        summed = dict(zip(values, self.devices.sum(list(values.values())), strict=True))
        if len(names) > 1:
            first = {names[0]: summed["loss"]}
            summed |= {**first, "loss": sum(weights[name] * {**summed, **first}[name] for name in names)}
        return summed

    def _too_large(self) -> InputError:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        fixed = (16 * trained + 4 * sum(p.numel() for p in self.model.parameters() if not p.requires_grad)) / 1e9
        each = len(range(*self.places[0].indices(self.config.batch_size)))
        return InputError(
            f"out of memory at step {self.step} with {each} samples at once; weights, gradients and optimizer alone "
            f"take {fixed:.3g} GB",
            where=self.out,
            fix=f"give another --out and --accumulate {self.config.accumulate * 2}, checkpoint_activations, "
            "precision bf16, freeze or lora",
        )

    def _diverged(self, what: str, draw: Draw) -> None:
        whole = checkpoint.complete(self.out)
        raise InputError(
            f"{what} at step {self.step}, on rows {draw}",
            where=self.out,
            fix=f"lower the learning rate; the last good checkpoint is {whole[-1].name if whole else 'none'}",
        )


_KEYS = ((), (1,), (2,), (3,))  # of the generators of a run's objectives


def _places(config: TrainConfig, devices: Devices) -> list[slice]:
    """The places of every global batch that this process handles, in its parts. Raises InputError."""
    mine = rank_slice(config.batch_size, devices.rank, devices.world)
    each = mine.stop - mine.start
    if each % config.accumulate:
        what = f"{each} samples of a process do not divide into {config.accumulate} parts"
        raise InputError(what, fix="change accumulate or batch_size")
    size = each // config.accumulate
    return [slice(start, start + size) for start in range(mine.start, mine.stop, size)]
