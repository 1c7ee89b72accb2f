"""What the probing verbs share: a JSON result that knows whether it is up to date, checks, names, model and camera."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.jsonable import jsonable
from vlm4vla_core import checkpoint, folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


def json_is_current(path: Path | None, kind: str, *, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """True when `path` holds a result of this kind made with exactly these settings from these inputs."""
    if path is None or not path.is_file():
        return False
    try:
        found = folders.read_json(path)
    except InputError:
        return False
    return isinstance(found, dict) and all(
        found.get(key) == value
        for key, value in (("format", f"vlm4vla-{kind}"), ("config", dict(config)), ("inputs", dict(inputs)))
    )


def write_result(path: Path, kind: str, *, config: Mapping[str, Any], inputs: Mapping[str, str], **more: Any) -> None:
    """Write a JSON result that `json_is_current` recognises; NaN, which JSON does not have, becomes null."""
    value = {"format": f"vlm4vla-{kind}", "version": 1, "config": dict(config), "inputs": dict(inputs), **more}
    folders.write_json(path, jsonable({**value, "made_by": folders.provenance()}))


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that numpy cannot take."""
    if seed < 0:
        raise InputError(f"seed {seed}", fix="use --seed 0 or more")


def show(frame: pd.DataFrame, digits: int = 3) -> str:
    """A table for people: numbers with `digits` decimals, nothing for what is not known."""
    return frame.to_string(index=False, float_format=lambda value: f"{value:.{digits}f}", na_rep="-")


def short_name(checkpoint: Path) -> str:
    """`runs/vla/checkpoints/step-000400` -> "vla step 400"; another folder's own name."""
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.startswith("step-"):
        return f"{checkpoint.parent.parent.name} step {int(checkpoint.name.removeprefix('step-'))}"
    return checkpoint.name


def use_device(wanted: str) -> str:
    """The torch device to compute on: `wanted`, or for "auto" the first GPU or else the CPU.

    Raises InputError for a device that is not there.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{wanted}' cannot be used ({str(error).splitlines()[0]})", fix="use cpu") from None
    return wanted


def few_threads(model: nn.Module) -> None:
    """One torch thread for a small model: on a busy machine its tiny steps lose far more to waiting than they gain."""
    import torch

    if sum(parameter.numel() for parameter in model.parameters()) < 5_000_000:
        torch.set_num_threads(1)


def local_model(path: Path) -> Path:
    """A local path as it is; a hub id (owner/name) as the folder of its snapshot, fetched when it is not there yet.

    Raises InputError when there is neither.
    """
    if path.exists() or path.is_absolute() or str(path).startswith(".") or len(path.parts) != 2:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except (OSError, HFValidationError, ValueError) as error:  # its own errors of connection and access are OSErrors
        reason = str(error).strip().splitlines()[0][:160]
        fix = "give a checkpoint or run folder, or go online and log in"
        raise InputError(
            f"no such checkpoint or run, and not to be had from the hub ({reason})", where=path, fix=fix
        ) from None


def preprocessing(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is done to a picture before the model sees it (JSON values).

    Raises InputError when a published folder's own processor normalises otherwise.
    """
    from vlm4vla_core.families import family

    spec = family(facts["family"])
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = folders.read_json(folder / name)
            found = found.get("image_processor", found) if isinstance(found, dict) else {}
            for key, ours in (("image_mean", spec.mean), ("image_std", spec.std)):
                theirs = found.get(key)
                if theirs and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
                    what = f"the checkpoint's processor has {key} {theirs}, this project gives {spec.name} {list(ours)}"
                    raise InputError(
                        what, where=folder / name, fix="features of such pictures would not be the model's"
                    )
    return {
        "size": facts["image_size"], "resize": "bicubic to a square", "normalise": facts["family"],
        "mean": list(spec.mean), "std": list(spec.std),
    }  # fmt: skip


def model_facts(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's folder, and its family, image size and camera, from config.json alone (no torch).

    path: a checkpoint or run folder, a published folder, or a hub id, which is fetched.
    """
    from vlm4vla_core.families import family_of_config

    path = local_model(path)
    if checkpoint.looks_like_one(path) or not (path / checkpoint.CONFIG).is_file():
        folder = checkpoint.resolve(path)
        config = folders.read_json(folder / checkpoint.CONFIG)
        if not isinstance(config, dict) or "backbone" not in config:
            raise InputError("config.json does not describe a model of this project", where=folder)
        described = config["backbone"]
        camera = (config.get("policy") or {}).get("camera")
        return folder, {"family": described["family"], "image_size": described["image_size"], "camera": camera}
    published = folders.read_json(path / checkpoint.CONFIG)
    spec = family_of_config(published if isinstance(published, dict) else {}, path)
    return path, {"family": spec.name, "image_size": spec.image_size, "camera": None}


def choose_camera(wanted: str | None, trained_on: str | None, store: Any) -> str:
    """The camera asked for, else the one trained on, else the store's first. Raises InputError on an unknown one."""
    if wanted is not None and wanted not in store.cameras:
        fix = nearest(wanted, store.cameras)
        raise InputError(f"no camera '{wanted}' in the store", where=store.path, fix=fix)
    return str(wanted or (trained_on if trained_on in store.cameras else store.cameras[0]))
