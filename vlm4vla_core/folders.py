"""Folders that are either whole or absent, with a manifest written last.

Every product of a verb (store, checkpoint, rows, features, report) is a folder with a JSON manifest. It is
written into a temporary sibling, flushed, and renamed; so a killed run leaves nothing half-written under the
final name. Re-issuing a verb asks `current` first and does nothing when config and inputs are unchanged.

Trap: a folder without its manifest is not a product, however complete it looks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm4vla_core.errors import InputError

FORMAT_VERSION = 1
_NEWER = {"episodes": 2}  # kinds whose format has changed since; older ones are still read
MANIFEST = "manifest.json"
STORE_MANIFEST = "dataset.json"  # what an episode store calls its manifest
_UPDATE = "update vlm4vla"
# What a manifest's kind is called in messages.
_THINGS = {"episodes": "episode store", "features": "features folder", "rollouts": "rollouts folder"}
_VERSIONED = ("vlm4vla", "torch", "transformers", "numpy", "pandas", "pyarrow", "scipy")


def format_version(kind: str) -> int:
    """The version that manifests of this kind are written with, and the newest that is read."""
    return _NEWER.get(kind, FORMAT_VERSION)


def project_root() -> Path:
    """The checkout that holds the packages (or site-packages, in an installed wheel)."""
    return Path(__file__).resolve().parent.parent


def shipped(relative: str) -> Path:
    """A file or folder that ships with the project, such as `data/paper`.

    Looks in the checkout first, then in the installed wheel. Raises InputError when neither has it.
    """
    for root in (project_root(), Path(__file__).resolve().parent / "_shipped"):
        if (root / relative).exists():
            return root / relative
    raise InputError("a file that ships with the project is missing", where=relative, fix="reinstall vlm4vla")


# --- hashes ---------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


# --- JSON -----------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (temporary sibling, flush, rename); NaN is refused, since JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{here()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists, paths as texts."""
    return json.loads(json.dumps(value, default=_plain))


def read_json(path: Path, *, fix: str = "") -> Any:
    """Read JSON. Raises InputError when the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("file not found", where=path, fix=fix) from None
    except (ValueError, RecursionError) as error:  # also nested too deeply, or a number of thousands of digits
        raise InputError(f"not valid JSON ({error})", where=path, fix=fix or "restore or remake the file") from None


# --- manifests ------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Who made this: library versions, commit, processor count, platform, time (UTC)."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "commit": _commit(),
        "hardware": {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str:
    if not (project_root() / ".git").exists():  # installed as a wheel: a repository around it is another project's
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "-C", str(project_root()), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def write_manifest(
    folder: Path,
    kind: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    name: str = MANIFEST,
    known: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write the manifest of a finished folder: what it is, how and from what it was made, and its files.

    config: the settings that decide the content. inputs: name -> fingerprint of what it was made from.
    known: fingerprints of files that need not be hashed again. more: further JSON values (counts, convention, cost).
    Returns the manifest.
    """
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": (known or {}).get(str(path.relative_to(folder))) or file_fingerprint(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != name and not path.name.startswith(".")
    }
    manifest = {
        "format": f"vlm4vla-{kind}",
        "version": format_version(kind),
        "config": dict(config),
        "inputs": dict(inputs),
        "fingerprint": fingerprint({path: entry["sha256"] for path, entry in files.items()}),
        **more,
        "files": files,
        "made_by": provenance(),
    }
    write_json(folder / name, manifest)
    return manifest


def read_manifest(
    folder: Path, kind: str, *, name: str = MANIFEST, fix: str = "", hashes: bool = False
) -> dict[str, Any]:
    """Read and check a folder's manifest: its kind, its version, and that every listed file is there and whole.

    hashes=True also compares every file's SHA-256 (reads everything). Raises InputError naming what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("this is a file, not a folder" if folder.exists() else "no such folder", where=folder, fix=fix)
    path, thing = folder / name, _THINGS.get(kind, kind)
    if not path.is_file():
        raise InputError(f"this folder has no {name}, so it is no finished {thing}", where=folder, fix=fix)
    manifest = read_json(path, fix=fix)
    if not isinstance(manifest, dict) or manifest.get("format") != f"vlm4vla-{kind}":
        found = manifest.get("format", "unknown") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"expected a {thing}, found format '{found}'", where=path, fix=fix)
    shape = {"version": int, "config": dict, "inputs": dict, "files": dict, "fingerprint": str}
    if wrong := [key for key, kind_of in shape.items() if not isinstance(manifest.get(key), kind_of)]:
        raise InputError(f"the manifest lacks a proper {', '.join(wrong)}", where=path, fix=fix or "remake the folder")
    if manifest["version"] > format_version(kind):
        raise InputError(
            f"written by a newer vlm4vla (format {manifest['version']}, this one reads {format_version(kind)})",
            where=path,
            fix=_UPDATE,
        )
    for relative, entry in manifest["files"].items():
        target = folder / relative
        if not target.is_file():
            raise InputError("a file listed in the manifest is missing", where=target, fix=fix or "remake the folder")
        if target.stat().st_size != entry["bytes"]:
            raise InputError(
                f"file has {target.stat().st_size} bytes, the manifest says {entry['bytes']}",
                where=target,
                fix=fix or "remake the folder",
            )
        if hashes and file_fingerprint(target) != entry["sha256"]:
            raise InputError("file content differs from the manifest", where=target, fix=fix or "remake the folder")
    return manifest


def current(
    folder: Path, kind: str, *, config: Mapping[str, Any], inputs: Mapping[str, str], name: str = MANIFEST
) -> bool:
    """True when `folder` is a whole product of this kind made from exactly this config and these inputs."""
    try:
        manifest = read_manifest(folder, kind, name=name)
    except InputError:
        return False
    wanted = as_json({"config": dict(config), "inputs": dict(inputs)})
    return manifest.get("config") == wanted["config"] and manifest.get("inputs") == wanted["inputs"]


def check_replaceable(folder: Path, kind: str) -> None:
    """Raise InputError when `folder` is there and holds anything but a product of this kind."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    for name in (MANIFEST, STORE_MANIFEST):
        if (folder / name).is_file():
            manifest = read_json(folder / name, fix="give another --out, or remove the folder")
            if isinstance(manifest, dict) and manifest.get("format") == f"vlm4vla-{kind}":
                return
    what = f"this folder already holds something that is no {_THINGS.get(kind, kind)}"
    raise InputError(what, where=folder, fix="give another --out, or remove it")


def refuse_other(folder: Path, kind: str, *, name: str = MANIFEST) -> None:
    """Raise InputError when `folder` holds a whole product of this kind, to be called when it is not the wanted one.

    For what took long to make (stores): a damaged one may be replaced, a good one with other settings or of a newer
    version may not.
    """
    try:
        read_manifest(folder, kind, name=name)
    except InputError as error:
        if error.fix == _UPDATE:
            raise
        return
    what = f"this folder holds another {_THINGS.get(kind, kind)}, made with other settings or from other inputs"
    raise InputError(what, where=folder, fix="give another --out, or remove it")


@contextmanager
def new_folder(final: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; on success flush and rename it into place, else remove it.

    An older product of the same kind is replaced only after the new one is whole; anything else that stands there
    (a run with its checkpoints, the store that was read, a user's own folder) is refused with an InputError before
    the work begins.
    """
    final = Path(final).resolve()  # of a link the target is replaced, not the link
    check_replaceable(final, kind)
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    temporary = final.with_name(f".{final.name}.{here()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Flush a finished folder and rename it to `final`, in place of what stands there; both on one file system."""
    old = final.with_name(f".{final.name}.{here()}.old")
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    shutil.rmtree(old, ignore_errors=True)


def here() -> str:
    """Machine and process, for names that no other process uses."""
    return f"{platform.node()}-{os.getpid()}"


def recover(final: Path) -> None:
    """Remove what killed processes of this machine left beside `final`; a product they had set aside comes back."""
    for left in final.parent.glob(f".{glob.escape(final.name)}.{glob.escape(platform.node())}-*"):
        words = left.name.rpartition("-")[2].split(".")
        if len(words) != 2 or not words[0].isdigit() or _alive(int(words[0])):
            continue
        if words[1] == "old" and not final.exists():  # killed between the two renames of `new_folder`
            left.replace(final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def sweep(work: Path) -> None:
    """Remove from a folder of work what killed processes of this machine left there, named `….{here()}`."""
    for left in work.glob(f"*.{glob.escape(platform.node())}-*"):
        process = left.name.rpartition("-")[2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
