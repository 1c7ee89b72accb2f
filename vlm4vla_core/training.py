"""One training loop for all objectives, exact to the bit: a killed run goes on as if nothing had happened.

A batch is a pure function of (seed, step), a checkpoint holds weights and optimizer, and nothing else is state. All
objectives start from the same weights for the same seed. Under torchrun the processes share every batch (`devices`).

Trap: exactness holds for one machine, library version and number of threads and processes; another order of summation
is another run in the last digits.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import checkpoint, faults, folders, trajectory
from vlm4vla_core.cached import on_cached_features
from vlm4vla_core.devices import Devices
from vlm4vla_core.episodes.sampling import rank_slice
from vlm4vla_core.errors import InputError
from vlm4vla_core.objectives import build, losses_module
from vlm4vla_core.optimisers import average, averaged, learning_rate, make_optimizer, set_rates
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.progress import progress
from vlm4vla_core.rollouts import Rollouts
from vlm4vla_core.run_folder import STOPPED, describe, finished, locked, prune, refuse_changes, run_inputs
from vlm4vla_core.run_log import RunLog, check_trackers
from vlm4vla_core.sharding import full, whole, within
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
    when memory does not suffice, and when the loss stops being finite (the last good checkpoint stays). Raises OSError
    when the disk is full, KeyboardInterrupt after Ctrl-C once the step is saved.
    """
    paths, out = _paths(data), Path(out)
    inputs, identity = run_inputs(config, paths), config.identity()
    if done := finished(config, inputs, out):
        return done
    check_trackers(config.trackers)
    opened = Data(config, paths)
    refuse_changes(out, identity, inputs)  # before the lock, which would write into a folder that is no run
    devices = Devices(config.device, config.parallel)
    with locked(out) if devices.first else nullcontext(), faults.threads(config.threads), faults.room_on_disk(out):
        refuse_changes(out, identity, inputs)  # again: another process may have begun here meanwhile
        run = _Run(config, opened, out, inputs, devices)
        with faults.stop_flag() as stop:
            return run.go(stop)


def _paths(data: Path | str | Sequence[Path]) -> list[Path]:
    return [Path(data)] if isinstance(data, Path | str) else [Path(one) for one in data]


class _Run:
    """One run in one folder: model, optimizer, data, and the step it has reached."""

    def __init__(self, config: TrainConfig, data: Data, out: Path, inputs: dict[str, str], devices: Devices) -> None:
        import torch

        self.config, self.data, self.out, self.inputs, self.devices = config, data, out, inputs, devices
        self.identity, self.step = config.identity(), 0
        self.metrics: dict[str, Any] = {}
        self.history: list[tuple[float, int]] = []  # held-out loss and step of every validation
        self.places = _places(config, devices)
        with devices.in_turn():
            self.model, self.objectives = build(config, data, inputs)
            self.model.train()
            self.backbone = getattr(self.model, "backbone", self.model)
            bf16 = config.precision == "bf16"
            if bf16:
                base = self.backbone.base  # query, head and losses stay outside
                for name in ("forward", "get_image_features"):
                    setattr(base, name, torch.autocast(devices.device.type, torch.bfloat16)(getattr(base, name)))
            if config.checkpoint_activations:
                self.backbone.checkpoint_activations()
            if not devices.sharded:
                self.model.to(devices.device)
            self.losses = devices.share(losses_module(self.model, self.objectives), self.backbone, bf16=bf16)
        self.optimizer = make_optimizer(config, self.model)
        self.log = RunLog(out, config.trackers, first=devices.first)
        self.rollouts = Rollouts(config, self.model) if config.rollout_every else None
        if devices.first and not (out / "run.json").exists():
            value = describe(config, data, inputs, self.model, processes=devices.world, device=devices.device.type)
            folders.write_json(out / "run.json", value)
        if config.cache_features:  # after run.json, so that a run that is killed meanwhile can go on
            self.objectives = on_cached_features(config, data, self.backbone, self.objectives, out, devices)

    # --- checkpoints and log

    def _save(self) -> Path:
        folder, sharded = checkpoint.step_folder(self.out, self.step), self.devices.sharded
        files = {name: value for one in self.objectives.values() for name, value in one.files.items()}
        about: dict[str, Any] = {
            "step": self.step, "config": self.identity, "inputs": self.inputs, "metrics": self.metrics, "files": files,
        }  # fmt: skip
        tensors = whole(self.model, self.optimizer) if sharded else None
        if self.devices.first:
            checkpoint.save(folder, self.model, optimizer=self.optimizer, tensors=tensors, **about)
        if self.config.ema and self.step == self.config.max_steps:
            with averaged(self.optimizer):
                tensors = whole(self.model, self.optimizer) if sharded else None
                if self.devices.first:
                    checkpoint.save(self.out / "ema" / folder.name, self.model, tensors=tensors, **about)
        if self.devices.first and self.config.keep_last:
            prune(self.out, self.config.keep_last, min(self.history)[1] if self.history else None)
        return folder

    def _resume(self) -> None:
        """Go back to the newest whole checkpoint, and cut the log to it; without one, measure and save the start."""
        devices, newest = self.devices, 0
        if devices.first:
            complete = [folder for folder in checkpoint.complete(self.out) if (folder / checkpoint.STATE).is_file()]
            newest = 1 + int(complete[-1].name.removeprefix("step-")) if complete else 0
        (reached,) = devices.sum([float(newest)])  # all follow the first
        if not reached:
            self.log.restart([])
            self._validate()
            self._snapshot(None)
            self._save()
            devices.wait()
            return
        folder = checkpoint.step_folder(self.out, int(reached) - 1)
        if reached > 1:
            checkpoint.fill(self.model, folder, "" if self.backbone is not self.model else "backbone.")
            self.step = checkpoint.restore_optimizer(folder, self.model, self.optimizer)
        self.metrics = folders.read_manifest(folder, checkpoint.KIND)["metrics"]
        lines = self.log.read(self.step)
        self.history = [(line["validation"]["loss"], line["step"]) for line in lines if "validation" in line]
        devices.wait()  # all have read
        self.log.restart(lines)

    def _validate(self) -> None:
        """Measure every objective on held-out rows. The first process does, all do when the model is sharded."""
        if not len(self.data.val.rows):
            return
        if self.devices.first or self.devices.sharded:
            self.model.eval()
            main, *others = self.objectives
            self.metrics = {**self._measure(main), **{name: self._measure(name) for name in others}}
            if self.config.ema and self.step:
                with averaged(self.optimizer):
                    self.metrics["ema_loss"] = self._measure(main)["loss"]
            self.model.train()
            self.log.line(self.step, validation=self.metrics)
        (loss,) = self.devices.sum([self.metrics["loss"] if self.devices.first else 0.0])
        self.history.append((loss, self.step))

    def _measure(self, name: str) -> dict[str, Any]:
        objective, data, size = self.objectives[name], self.data, self.backbone.image_size

        def batch(places: slice, rng: np.random.Generator) -> Any:
            mine = data.val.part(places)
            return objective.make(data.images(mine, size), mine, rng, slice(None))

        if self.devices.sharded:
            return within(self.losses, lambda: objective.evaluate(batch, len(data.val.rows)))
        return objective.evaluate(batch, len(data.val.rows))

    def _snapshot(self, norms: dict[str, float] | None) -> None:
        first, sharded = self.devices.first, self.devices.sharded
        if self.config.snapshots == "none" or not (first or sharded) or not trajectory.due(self.step):
            return
        folder = self.out / "trajectory" / f"step-{self.step:06d}"
        trajectory.record(folder, self.model, weights=self.config.snapshots == "weights", write=first)
        self.log.line(self.step, **({"gradient_norms": norms} if norms else {}), snapshot=folder.name)

    def _roll_out(self) -> None:
        """Short rollouts on validation episodes, by the first process."""
        if self.rollouts is not None and self.devices.first:
            self.log.line(self.step, rollouts=self.rollouts.run())

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
                    self.log.line(
                        self.step, **losses, lr=rate, grad_norm=norm, samples_per_s=round(speed, 1),
                        waiting=round(waited / taken, 4), memory_gb=round(self.devices.memory_gb(), 3),
                        **({"skipped": self.data.skipped} if config.skip_corrupt else {}),
                    )  # fmt: skip
                best = False
                if last or (config.val_every and self.step % config.val_every == 0):
                    self._validate()
                    best = bool(self.history) and min(self.history)[1] == self.step
                    over = self._no_better()
                if config.rollout_every and (last or over or self.step % config.rollout_every == 0):
                    self._roll_out()
                wanted = config.save_every and self.step % config.save_every == 0
                if last or over or stopping or wanted or (best and config.keep_last):
                    folder = self._save()
                if over and not last and self.devices.first:
                    folders.write_json(self.out / STOPPED, {"step": self.step, "why": f"patience {config.patience}"})
                if stopping and not last:
                    raise KeyboardInterrupt
            for future in ahead:
                future.cancel()
        self.log.close()
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
            except RuntimeError as error:
                if not faults.out_of_memory(error):
                    raise
                needed = faults.memory_needed(self.model) / (self.devices.world if self.devices.sharded else 1)
                each = len(range(*self.places[0].indices(self.config.batch_size)))
                raise faults.too_large(needed, self.step, each, self.config.accumulate, self.out) from error
        if not math.isfinite(losses["loss"]):
            faults.diverged(f"the loss is {losses['loss']}", self.step, draw, self.out)
        snapshot = self.config.snapshots != "none" and trajectory.due(self.step + 1)
        norms = trajectory.gradient_norms(self.model) if snapshot else None
        limit = self.config.clip or math.inf
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(full(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        if not math.isfinite(norm):
            faults.diverged(f"the gradient norm is {norm}", self.step, draw, self.out)
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
