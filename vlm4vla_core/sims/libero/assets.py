"""Where LIBERO's meshes and textures lie, and how they get there: the Python package comes without them.

`python -m vlm4vla_core.sims.libero` in LIBERO's environment fetches them from where LIBERO does.

Trap: hf-libero 0.1.4 ignores the `assets` entry of its own config file; its path is set in the imported package.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from vlm4vla_core import folders
from vlm4vla_core.sims.simulator import packages, where

VARIABLE = "VLM4VLA_SIM_ASSETS"
PARTS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
FETCH = ".venv-libero/bin/python -m vlm4vla_core.sims.libero"
ADVICE = f"fetch them with `{FETCH}`, or name a folder that holds libero/assets in {VARIABLE} or by --assets"


def places() -> list[Path]:
    """Folders looked into, in this order: the user's, the package's own, and where LIBERO's download puts them."""
    named = os.environ.get(VARIABLE)
    found = [Path(named) / "libero" / "assets"] if named else []
    found += [package / "libero" / "assets" for package in _package()]
    return [*found, Path.home() / ".cache" / "libero" / "assets"]


def _package() -> list[Path]:
    if where("libero", "libero") == "here":
        from importlib.util import find_spec

        spec = find_spec("libero")
        return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    return packages("libero", "libero")


def folder() -> Path | None:
    """The first folder that holds LIBERO's assets, or None."""
    return next((place for place in places() if all((place / part).is_dir() for part in PARTS)), None)


def stand_ins(place: Path) -> list[str]:
    """Files in an asset folder that replace originals, by the manifest.json beside it."""
    manifest = place.parent / "manifest.json"
    told = folders.read_json(manifest) if manifest.is_file() else {}
    return [str(name) for name in told.get("stand_ins", ())] if isinstance(told, dict) else []


def configure(directory: Path) -> None:
    """Write LIBERO's config file into a folder and point the package there; without it, its import asks a question on
    the terminal. To be called before the first import of `libero.libero`."""
    root = _package()[0] / "libero"
    directory.mkdir(parents=True, exist_ok=True)
    entries = {"benchmark_root": root, "datasets": root.parent / "datasets", "assets": folder() or root / "assets"}
    entries |= {name: root / name for name in ("bddl_files",)} | {"init_states": root / "init_files"}
    draft = directory / f".config-{os.getpid()}.yaml"
    draft.write_text("".join(f"{name}: {path}\n" for name, path in entries.items()))
    draft.replace(directory / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(directory)


def fetch() -> int:
    """Fetch what LIBERO itself would, to where it would put it; returns an exit code."""
    with tempfile.TemporaryDirectory() as directory:
        configure(Path(directory))
        from huggingface_hub import snapshot_download
        from libero.libero.utils.download_utils import HF_ASSETS_REPO_ID

        try:
            # Not by LIBERO's own function, which hands the hub's library an argument that is no longer there.
            print(snapshot_download(HF_ASSETS_REPO_ID, repo_type="dataset", local_dir=places()[-1]))
        except Exception as error:  # whatever the hub raises: without a network, a moved repository, a full disk
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"LIBERO's assets could not be fetched ({reason})", file=sys.stderr)
            return 1
    return 0 if folder() else 1
