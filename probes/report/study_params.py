"""Parameters of the notebooks that show a study, and what decides whether their pages are up to date.

A study is given as its TOML file (whatever is done of it, also nothing), its folder, or a bundle of `study export`.
Trap: a study folder holds checkpoints of many gigabytes; only its tables count as input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from probes.report.params import Input, Level, NotebookParams, find_path
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

_TABLES = "tables"


@dataclass(frozen=True)
class StudyInput(Input):
    """Marks a parameter as a study: its TOML file, its folder, or a bundle."""

    def resolve(self, value: Any) -> Path:
        """The existing path. Raises InputError when it is no study."""
        if not isinstance(value, str | Path):
            raise ValueError("should be the path of a study's TOML file, of its folder, or of a bundle")
        path = find_path(value, fix="`vlm4vla study plan FILE` reads such a file; studies/nano.toml is one")
        if path.is_dir() and not (path / _TABLES / "study.json").is_file() and not (path / folders.MANIFEST).is_file():
            what, fix = "neither a study's folder with tables nor a bundle", "vlm4vla study run FILE makes the tables"
            raise InputError(what, where=path, fix=fix)
        if path.is_file() and path.suffix != ".toml":
            raise InputError("a study is declared in a .toml file", where=path)
        return path


def study_fingerprint(path: Path) -> str:
    """Fingerprint of what is known of a study: of a file its declaration, what ships, and which jobs are done."""
    if path.is_dir():
        if (path / folders.MANIFEST).is_file():
            return str(folders.read_json(path / folders.MANIFEST)["fingerprint"])
        files = sorted((path / _TABLES).iterdir())
        return folders.fingerprint({file.name: folders.file_fingerprint(file) for file in files if file.is_file()})
    from vlm4vla_core.study.declare import read_study

    study = read_study(path)
    bundle = study.folder / study.shipped / folders.MANIFEST
    shipped = folders.read_json(bundle)["fingerprint"] if study.shipped and bundle.is_file() else ""
    jobs = sorted(study_folder(study.name).glob("jobs/*/done.json"))
    done = {job.parent.name: folders.file_fingerprint(job) for job in jobs}
    return folders.fingerprint({"study": study.model_dump(mode="json"), "shipped": shipped, "done": done})


def study_folder(name: str) -> Path:
    """`runs/studies/NAME`, where `vlm4vla study run` puts a study; the project's own where there is none here."""
    own = folders.project_root() / "runs/studies" / name
    here = Path("runs/studies") / name
    return here if here.exists() or not own.exists() else own


StudyPath = Annotated[Path, StudyInput(), Field(description="a study's TOML file, its folder, or a bundle")]


def _fingerprints(params: Any) -> dict[str, str]:
    """label -> fingerprint of the study."""
    return {label: study_fingerprint(path) for label, path in params.inputs.items()}


class StudyOverviewParams(NotebookParams):
    """Parameters of `study_overview`."""

    notebook: ClassVar[str] = "study_overview"
    study: StudyPath
    level: Level

    input_fingerprints = _fingerprints


class AuxiliaryTasksParams(NotebookParams):
    """Parameters of `auxiliary_tasks`."""

    notebook: ClassVar[str] = "auxiliary_tasks"
    study: StudyPath
    level: Level

    input_fingerprints = _fingerprints


class ModuleAblationParams(NotebookParams):
    """Parameters of `module_ablation`."""

    notebook: ClassVar[str] = "module_ablation"
    study: StudyPath
    level: Level

    input_fingerprints = _fingerprints


class VisionInjectionParams(NotebookParams):
    """Parameters of `vision_injection`."""

    notebook: ClassVar[str] = "vision_injection"
    study: StudyPath
    level: Level

    input_fingerprints = _fingerprints
