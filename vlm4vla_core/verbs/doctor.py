"""What is installed here, what is missing, and what to do about it: one line each.

Versions, the GPU, torch's threads, the simulators and their assets (looked up, never imported; also in the simulators'
own environments beside the project), a Chromium for the report tests, and the families that this transformers knows.
Everything below the first block is optional, so the exit code is 0 whatever is missing.

Example: vlm4vla doctor --try-families
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from vlm4vla_core import folders


@dataclass(frozen=True)
class Args:
    try_families: bool = False
    """Also build each family's tiny model and run it once (some ten seconds)."""
    json: Path | None = None
    """Also write the findings as JSON."""


@dataclass(frozen=True)
class Finding:
    """One line: state "ok", "missing" or "note"; what was looked for; what was found; what to do, if anything."""

    group: str
    state: str
    name: str
    found: str
    do: str = ""


REQUIRED = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy", "pandas", "pyarrow")
_NAMES = {"libero": "LIBERO", "simpler": "SimplerEnv", "calvin": "CALVIN"}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def run(args: Args) -> int:
    from vlm4vla_core.progress import progress

    findings: list[Finding] = []
    steps: list[Callable[[], Iterator[Finding]]] = [_versions, _torch, _simulators, _tools]
    with progress(total=len(steps) + 1, what="doctor", unit="check") as bar:
        for step in steps:
            findings += step()
            bar.update(1)
        findings += _families(args.try_families)
        bar.update(1)
    group = ""
    for one in findings:
        if one.group != group:
            group = one.group
            print(f"{group}:")
        print(f"  {one.state:<8}{one.name:<18}{one.found}" + (f"; {one.do}" if one.do else ""))
    if args.json:
        folders.write_json(args.json, {"findings": [asdict(one) for one in findings], "made_by": folders.provenance()})
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    import platform

    yield Finding("versions", "ok", "python", platform.python_version())
    for package in REQUIRED:
        found = _version(package)
        do = "" if found else f"pip install {package}"
        yield Finding("versions", "ok" if found else "missing", package, found or "not installed", do)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("hardware", "missing", "torch", f"cannot be imported ({error})", "install it again")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield Finding("hardware", "ok", f"GPU {index}", f"{device.name}, {device.total_memory / 1e9:.0f} GB")
    if not count:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        do = "tiny models train on the CPU, models of billions need a GPU"
        yield Finding("hardware", "note", "GPU", f"none that this torch ({build} build) can use", do)
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    do = f"set OMP_NUM_THREADS to {cores} or less" if threads > cores else ""
    asked = os.environ.get("OMP_NUM_THREADS", "unset")
    found = f"{threads} (OMP_NUM_THREADS {asked}) on {cores} cores"
    yield Finding("hardware", "note" if do else "ok", "torch threads", found, do)
    if _version("torchvision"):
        found = f"{_version('torchvision')} is installed; this project does not use it"
        try:
            import torchvision  # noqa: F401
        except Exception as error:  # whatever a half-fitting build raises: transformers would meet it too
            what = f"{_version('torchvision')} does not fit this torch ({type(error).__name__})"
            yield Finding("hardware", "note", "torchvision", what, "pip uninstall torchvision, or models cannot load")
        else:
            yield Finding("hardware", "ok", "torchvision", found)


# --- simulators -----------------------------------------------------------------------------------------


def _simulators() -> Iterator[Finding]:
    """Each simulator's packages, and what else its protocol misses: assets, a renderer, a driver, a checkout."""
    from vlm4vla_core.sims import simulators
    from vlm4vla_core.sims.simulator import where

    yield Finding("simulators", "ok", "tabletop", "built in")
    first = {bench.environment: bench for bench in reversed(simulators().values())}  # one protocol of each simulator
    for environment, bench in sorted(first.items()):
        name = _NAMES.get(environment, environment)
        places = {module: where(module, environment) for module in bench.modules}
        if gone := [module for module, place in places.items() if not place]:
            yield Finding("simulators", "missing", name, f"no {', '.join(gone)}", f"make venv-{environment}")
        else:
            there = " / ".join(sorted(set(places.values())))
            yield Finding("simulators", "ok", name, f"{', '.join(bench.modules)} ({there})")
        lines = [line for line in bench.missing() if f"make venv-{environment}" not in line]
        for line in lines:
            found, _, do = line.removeprefix(f"{bench.protocol} needs ").partition(": ")
            yield Finding("simulators", "missing", f"{name} needs", found, do)
        if not lines:
            yield Finding("simulators", "ok", f"{name} needs", "everything else is there, assets included")


# --- tools and families ---------------------------------------------------------------------------------


def _tools() -> Iterator[Finding]:
    chromium = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    do = "" if chromium else "only the tests that open reports in a browser need one"
    yield Finding("tools", "ok" if chromium else "missing", "Chromium", chromium or "none on the PATH", do)
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0")
    found = f"cache {home}, " + ("offline (HF_HUB_OFFLINE is set)" if offline else "online when a model is asked for")
    yield Finding("tools", "note" if offline else "ok", "model hub", found)
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding("tools", "ok" if free > 20 else "note", "disk", f"{free:.0f} GB free here")


def _families(try_them: bool) -> Iterator[Finding]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from vlm4vla_core.families import families, family

    for name in families():
        missing = [kind for kind in family(name).model_types if kind not in CONFIG_MAPPING_NAMES]
        if missing:
            what = f"this transformers does not know {', '.join(missing)}"
            yield Finding("families", "missing", name, what, "update transformers")
        elif try_them:
            yield _try_family(name)
        else:
            yield Finding("families", "ok", name, "known to this transformers")


def _try_family(name: str) -> Finding:
    import numpy as np
    import torch

    from vlm4vla_core.backbone import tiny

    try:
        backbone = tiny(name)
        side = backbone.image_size
        with torch.no_grad():
            states = backbone(backbone.collate(np.zeros((1, side, side, 3), np.uint8), ["move left"]))
    except Exception as error:  # a diagnosis: whatever breaks is the finding
        reason = (str(error).splitlines() or [""])[0][:120]
        return Finding("families", "missing", name, f"does not run ({type(error).__name__}: {reason})", "report this")
    return Finding("families", "ok", name, f"a tiny one ran, hidden states {tuple(states.shape)}")
