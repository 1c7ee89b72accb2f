"""A training run's folder: what it was made from, who holds it, which checkpoints stay. Needs no torch.

RUN/run.json (settings), RUN/log.jsonl, RUN/checkpoints/step-000000 (the start, kept) … step-NNNNNN (the last).

Trap: a run that stopped early has no checkpoint of its last step; RUN/stopped.json says that it is finished.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.episodes.store import REMAKE
from vlm4vla_core.errors import InputError
from vlm4vla_core.presets import DRAWN, TrainConfig
from vlm4vla_core.vqa.files import KINDS, fingerprint, question_files

if TYPE_CHECKING:
    from vlm4vla_core.training_data import Data

STOPPED = "stopped.json"


def run_inputs(config: TrainConfig, data: Sequence[Path]) -> dict[str, str]:
    """Fingerprints of what a run is made from: its stores or question files and, where given, its backbone. Raises
    InputError."""
    inputs = {"data": "+".join(data_fingerprint(path) for path in data)}
    if config.backbone not in DRAWN:
        inputs["backbone"] = backbone_fingerprint(config.backbone)
    return inputs


def data_fingerprint(path: Path) -> str:
    """What stands for a store or question files in identities. Raises InputError when they are not there."""
    if question_files(path):
        return fingerprint(path)
    if not path.exists() and path.suffix in KINDS:
        raise InputError("no such question file", where=path)
    return str(folders.read_manifest(path, "episodes", name=folders.STORE_MANIFEST, fix=REMAKE)["fingerprint"])


def backbone_fingerprint(path: str) -> str:
    """What stands for a model in identities: of a checkpoint its manifest's, of a Hugging Face folder its files'."""
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


def finished(config: TrainConfig, inputs: dict[str, str], out: Path) -> Path | None:
    """The last checkpoint of a run that is finished and unchanged, else None."""
    step = folders.read_json(out / STOPPED)["step"] if (out / STOPPED).is_file() else config.max_steps
    last = checkpoint.step_folder(out, step)
    return last if folders.current(last, checkpoint.KIND, config=config.identity(), inputs=inputs) else None


def refuse_changes(out: Path, identity: dict[str, Any], inputs: dict[str, str]) -> None:
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
def locked(out: Path, busy: str = "another process is training in this folder") -> Iterator[None]:
    """Hold a folder's lock, which the system drops when the process ends, however it ends. busy: what to say if taken.

    A folder in which nothing came to be is taken away again.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(busy, where=out, fix="wait for it") from None
        try:
            yield
        finally:
            if [path.name for path in out.iterdir()] == [".lock"]:
                shutil.rmtree(out)


def prune(out: Path, keep_last: int, best: int | None) -> None:
    """Remove checkpoints but the start, the `keep_last` newest and the best; the manifest goes first."""
    kept = {checkpoint.step_folder(out, step) for step in (0, best) if step is not None}
    for folder in checkpoint.complete(out)[:-keep_last]:
        if folder not in kept:
            (folder / folders.MANIFEST).unlink()
            shutil.rmtree(folder)


def describe(
    config: TrainConfig, data: Data, inputs: dict[str, str], model: Any, *, processes: int, device: str
) -> dict[str, Any]:
    """What run.json holds: settings, data, parameters, devices."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    new, share = model.new_parameters() if hasattr(model, "new_parameters") else (0, 0.0)
    mixture = data.mixture
    return {
        "format": "vlm4vla-run",
        "version": folders.FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "identity": config.identity(),
        "inputs": inputs,
        "data": {
            "path": data.paths,
            "camera": data.cameras,
            "weights": mixture.weights,
            "train_rows": sum(map(len, mixture.train)),
            "val_rows": len(data.val.rows),
            "dropped_val_episodes": mixture.dropped,
            "cut": data.cut(),
        },
        "parameters": {"total": total, "trained": trained, "new": new, "new_share": share},
        "devices": {
            "processes": processes,
            "device": device,
            **({"parallel": config.parallel} if processes > 1 else {}),
        },
        "made_by": folders.provenance(),
    }
