"""The Vulkan driver that SAPIEN renders with: Mesa's lavapipe, on the CPU; found, judged, and prepared when too old.

`make venv-simpler` calls `python -m vlm4vla_core.sims.simpler.driver .venv-simpler/vulkan`, which downloads a newer
Mesa from the distribution's backports and unpacks it there, beside the system's. Nothing is installed and no root is
needed: apt works in folders of its own; mirror and key are those of the machine's own sources.

Trap: SAPIEN reads VK_ICD_FILENAMES when it is first imported, so `activate` comes before that.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

NEEDED = (25, 0)  # the oldest Mesa that was seen to work; SAPIEN 3.0.3 finds no device in 22.3
VARIABLES = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")
_PACKAGE = "mesa-vulkan-drivers"
_MANIFEST = "lvp_icd.json"
_SYSTEM = (Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d"), Path("/usr/local/share/vulkan/icd.d"))
_LIBRARIES = tuple(map(Path, ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")))
_DO = "run `make venv-simpler`, or install a newer mesa-vulkan-drivers and name its manifest in VK_ICD_FILENAMES"


@dataclass(frozen=True)
class Driver:
    """One lavapipe: its manifest (.json), its library, and Mesa's version; (0, 0) where the library tells none."""

    manifest: Path
    library: Path
    version: tuple[int, int]

    @property
    def usable(self) -> bool:
        return self.version >= NEEDED

    def __str__(self) -> str:
        return f"Mesa {self.version[0]}.{self.version[1]} lavapipe ({self.library})"


def prepared() -> list[Path]:
    """Where a driver of our own may lie: in the running environment, and in the simulator's beside the project."""
    return [Path(sys.prefix) / "vulkan", folders.project_root() / ".venv-simpler" / "vulkan"]


def drivers() -> Iterator[Driver]:
    """All lavapipe drivers here, our own first."""
    seen = set()
    for place in (*prepared(), *_SYSTEM):
        for manifest in sorted(place.glob("lvp_icd*.json")):
            driver = read(manifest)
            if driver is not None and driver.library.resolve() not in seen:
                seen.add(driver.library.resolve())
                yield driver


def read(manifest: Path) -> Driver | None:
    """The driver of a manifest, or None when its library is not there."""
    named = _library(manifest)
    if named is None:
        return None
    places = [manifest.parent / named] if "/" in named else [folder / named for folder in _LIBRARIES]
    library = next((place for place in places if place.is_file()), None)
    if library is None:
        return None
    found = re.search(rb"Mesa (\d+)\.(\d+)", library.read_bytes())  # what it tells programs as its name
    return Driver(manifest, library, (int(found[1]), int(found[2])) if found else (0, 0))


def _library(manifest: Path) -> str | None:
    """The library that a manifest names, a bare name or a path from the manifest on; None when it is no manifest."""
    try:
        return str(json.loads(manifest.read_text())["ICD"]["library_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def missing() -> list[str]:
    """What is wrong with the driver, in one line; nothing when one can be used. One that the user names is believed
    when its manifest and library are there."""
    for variable in VARIABLES:
        if named := os.environ.get(variable):
            for name in named.split(":"):
                if not Path(name).is_file():
                    return [f"{variable} names {name}, which is not there: correct or unset it"]
                library = _library(Path(name))  # where a bare name lies is the loader's business
                if library is None or ("/" in library and not (Path(name).parent / library).is_file()):
                    return [f"{variable} names {name}, no manifest of a driver that is here: correct or unset it"]
            return []
    found = list(drivers())
    if any(driver.usable for driver in found):
        return []
    need = f"SAPIEN renders with Mesa {NEEDED[0]}.{NEEDED[1]} or newer (lavapipe, on the CPU)"
    if not found:
        return [f"{need}, and no lavapipe is here: {_DO}"]
    return [f"{need}, and {', '.join(map(str, found))} is too old: {_DO}"]


def failed(error: Exception) -> InputError:
    """What to say when SAPIEN raised `error` because it cannot draw."""
    named = next((f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)), "its driver")
    reason = (str(error).splitlines() or [""])[0]
    return InputError(f"SAPIEN cannot draw with {named} ({reason})", fix=f"unset the variable, or {_DO}")


def activate() -> None:
    """Make SAPIEN, imported after this, use the first driver that is new enough. Raises InputError when none is."""
    if any(os.environ.get(variable) for variable in VARIABLES):
        return
    driver = next((driver for driver in drivers() if driver.usable), None)
    if driver is None:
        raise InputError(missing()[0])
    os.environ["VK_ICD_FILENAMES"] = str(driver.manifest)
    # Libraries that came beside the driver are found by their names once they are loaded; some need others first.
    waiting = [path for path in driver.library.parent.glob("*.so*") if path != driver.library]
    while waiting:
        left = [path for path in waiting if not _loads(path)]
        if len(left) == len(waiting):
            break
        waiting = left


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


# --- preparing one --------------------------------------------------------------------------------------


def prepare(out: Path) -> Driver:
    """Put a lavapipe into the folder `out`, unless one that is new enough is here. Raises InputError when it cannot."""
    for driver in drivers():
        if driver.usable:
            return driver
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "dpkg-query"):
        if shutil.which(tool) is None:
            what = f"a newer driver can be prepared on Debian only, and {tool} is not here"
            raise InputError(what, fix="install Mesa 25.0 or newer with lavapipe, then run this again")
    source, suite = backports(Path("/etc/apt"), codename())
    with tempfile.TemporaryDirectory(prefix="vlm4vla-vulkan-") as scratch:
        work = Path(scratch)
        apt = _Apt(work, source)
        apt("apt-get", "update")
        try:
            apt("apt-get", "download", f"{_PACKAGE}/{suite}")
        except InputError:  # a new release may have it without backports
            apt("apt-get", "download", _PACKAGE)
        unpacked, had = work / "unpacked", {_PACKAGE, "libvulkan1"}  # SAPIEN brings the loader
        while archives := list((work / "archives").glob("*.deb")):  # then what it needs and the system lacks
            needs: set[str] = set()
            for archive in archives:
                _run("dpkg-deb", "-x", str(archive), str(unpacked))
                needs |= depends(_run("dpkg-deb", "-f", str(archive), "Pre-Depends", "Depends"))
                archive.unlink()
            if wanted := sorted(name for name in needs - had if not _installed(name)):
                apt("apt-get", "download", *wanted)
            had |= needs
        keep = work / "keep"
        keep.mkdir()
        for library in (*unpacked.glob("usr/lib/*/lib*.so*"), *unpacked.glob("lib/*/lib*.so*")):
            if library.name == "libvulkan_lvp.so" or not library.name.startswith(("libvulkan", "libVk")):
                shutil.copy2(library, keep / library.name, follow_symlinks=False)
        written = json.loads(next(unpacked.glob("usr/share/vulkan/icd.d/lvp_icd*.json")).read_text())
        written["ICD"]["library_path"] = "./libvulkan_lvp.so"  # beside the manifest
        (keep / _MANIFEST).write_text(json.dumps(written, indent=1))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(keep, out, symlinks=True)
    made = read(out / _MANIFEST)
    if made is None or not made.usable:
        raise InputError(f"the backports hold {made}, which is too old", where=out, fix=_DO)
    return made


def codename() -> str:
    """The distribution's release, such as bookworm. Raises InputError where /etc/os-release names none."""
    try:
        found = re.search(r"^VERSION_CODENAME=\"?([\w-]+)", Path("/etc/os-release").read_text(), re.M)
    except OSError:
        found = None
    if not found:
        raise InputError("this distribution does not tell its name in /etc/os-release", fix=_DO)
    return found[1]


def backports(apt: Path, release: str) -> tuple[str, str]:
    """A source in apt's deb822 form with the release and its backports, and the backports' suite; address and key are
    those of the machine's own entry for the release. Raises InputError when apt's folder has no such entry."""
    suite = f"{release}-backports"
    for entry in _entries(apt):
        if release in entry["suites"].split():
            lines = ["Types: deb", f"URIs: {entry['uris']}", f"Suites: {release} {suite}", "Components: main"]
            if "signed-by" in entry:
                lines.append(f"Signed-By: {entry['signed-by']}")
            return "\n".join(lines) + "\n", suite
    raise InputError(f"no source of {release} is set up for apt, so nothing tells where its backports are", where=apt)


def _entries(apt: Path) -> Iterator[dict[str, str]]:
    """Binary sources of /etc/apt, in either form: uris, suites and, where given, signed-by."""
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            lines = [line for line in stanza.splitlines() if not line.lstrip().startswith("#")]
            # A key that stands in the file itself goes over several indented lines.
            fields = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", "\n".join(lines), re.M)
            entry = {name.lower(): value for name, value in fields}
            on = entry.get("enabled", "yes").lower() != "no" and "deb" in entry.get("types", "").split()
            if on and {"uris", "suites"} <= set(entry):
                yield entry
    for path in (apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))):
        text = path.read_text() if path.is_file() else ""
        for options, uri, suite in re.findall(r"^deb[ \t]+(?:\[(.*?)\][ \t]+)?(\S+)[ \t]+(\S+)", text, re.M):
            entry = {"uris": uri, "suites": suite}
            if key := re.search(r"signed-by=(\S+)", options):
                entry["signed-by"] = key[1].replace(",", " ")
            yield entry


def depends(fields: str) -> set[str]:
    """Package names in dpkg's dependency fields, the first of every choice."""
    listed = ",".join(line.partition(": ")[2] for line in fields.splitlines())
    return {found[0] for part in listed.split(",") if (found := re.match(r"[\w.+-]+", part.strip()))}


def _installed(package: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True, check=False)
    return "install ok installed" in done.stdout


class _Apt:
    """apt-get with one source and with lists and archives in a folder of its own; the machine's other settings hold."""

    def __init__(self, work: Path, source: str) -> None:
        self._archives = work / "archives"
        for folder in ("lists/partial", "archives/partial"):
            (work / folder).mkdir(parents=True)
        sources = work / "private.sources"
        sources.write_text(source)
        options = {
            "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "-", "Dir::State::lists": work / "lists",
            "Dir::Cache": work, "Dir::Cache::archives": self._archives, "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }  # fmt: skip
        self._options = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

    def __call__(self, tool: str, *words: str) -> str:
        return _run(tool, *self._options, *words, cwd=self._archives)


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise InputError(f"{command[0]} failed ({said[-1] if said else done.returncode})", fix=_DO)
    return done.stdout


if __name__ == "__main__":
    try:
        print(prepare(Path(sys.argv[1])))
    except InputError as error:
        sys.exit(str(error))
