"""`vlm4vla doctor`: never fails, names what is missing and what to do, and imports no simulator to find one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vlm4vla_core.cli import main
from vlm4vla_core.families import families
from vlm4vla_core.verbs import doctor


def findings(capsys, tmp_path: Path, *words: str) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json", str(tmp_path / "d.json"), *words]) == 0
    listed = json.loads((tmp_path / "d.json").read_text())["findings"]
    shown = capsys.readouterr().out
    assert all(one["name"] in shown and one["found"] in shown for one in listed)
    return {one["name"]: one for one in listed}


def test_it_finds_what_is_here(tmp_path: Path, capsys):
    import torch
    import transformers

    found = findings(capsys, tmp_path)
    assert torch.__version__.startswith(found["torch"]["found"])  # wheels of a GPU index leave the +cu130 out
    assert found["transformers"]["found"] == transformers.__version__
    assert all(found[name]["state"] == "ok" for name in families())
    assert found["tabletop"]["state"] == "ok"
    assert ("GPU 0" in found) == torch.cuda.is_available()
    assert f"{torch.get_num_threads()} " in found["torch threads"]["found"]


def test_what_is_missing_is_named_with_what_to_do(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from vlm4vla_core.sims import simulator

    monkeypatch.setattr(doctor.folders, "project_root", lambda: tmp_path)
    monkeypatch.setattr(simulator.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    for name in ("MS_ASSET_DIR", "CALVIN_ROOT", "VLM4VLA_SIM_ASSETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = findings(capsys, tmp_path)
    for name, do in (
        ("LIBERO", "make venv-libero"),
        ("SimplerEnv", "make venv-simpler"),
        ("CALVIN", "make venv-calvin"),
    ):
        assert found[name]["state"] == "missing" and found[name]["do"] == do
    for name in ("LIBERO needs", "SimplerEnv needs", "CALVIN needs", "Chromium"):
        assert found[name]["state"] == "missing" and found[name]["do"]


def test_simulators_beside_the_project_and_assets_are_found(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from vlm4vla_core.sims.libero import assets

    packages = tmp_path / ".venv-libero" / "lib" / "python3.11" / "site-packages"
    for name in ("libero", "robosuite", "mujoco", "bddl"):
        (packages / name).mkdir(parents=True)
    for part in assets.PARTS:
        (tmp_path / "mine" / "libero" / "assets" / part).mkdir(parents=True)
    monkeypatch.setattr(doctor.folders, "project_root", lambda: tmp_path)
    monkeypatch.setenv("VLM4VLA_SIM_ASSETS", str(tmp_path / "mine"))
    monkeypatch.setattr("vlm4vla_core.sims.libero.renderer", lambda: "osmesa")
    found = findings(capsys, tmp_path)
    assert found["LIBERO"]["state"] == found["LIBERO needs"]["state"] == "ok"
    monkeypatch.setattr("vlm4vla_core.sims.libero.renderer", lambda: "")
    found = findings(capsys, tmp_path)
    assert found["LIBERO needs"]["found"] == "a renderer" and "libosmesa6" in found["LIBERO needs"]["do"]
    assert not {"mani_skill", "sapien", "libero", "robosuite", "pybullet"} & set(sys.modules)


def test_families_can_be_tried(tmp_path: Path, capsys):
    found = findings(capsys, tmp_path, "--try-families")
    assert all("a tiny one ran" in found[name]["found"] for name in families())
