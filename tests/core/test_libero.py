"""LIBERO without LIBERO: its protocols against the published ones, where assets are looked for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm4vla_core import folders
from vlm4vla_core.actions import LIBERO
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims import benchmark, coverage, libero, simulator, simulators
from vlm4vla_core.sims.libero import PROTOCOLS, assets

# OpenVLA's and VLM4VLA's public evaluation code: tasks and steps of each suite, 50 initial states, 10 waiting steps.
PUBLISHED = {"libero-spatial@1": (10, 220), "libero-object@1": (10, 280), "libero-goal@1": (10, 300)}
PUBLISHED |= {"libero-10@1": (10, 520), "libero-90@1": (90, 400)}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no simulator and no assets."""
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    monkeypatch.setattr(simulator.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VLM4VLA_SIM_ASSETS", raising=False)
    monkeypatch.setattr("vlm4vla_core.sims.libero.renderer", lambda: "osmesa")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_protocols_are_the_published_ones() -> None:
    for name, (tasks, steps) in PUBLISHED.items():
        bench = PROTOCOLS[name]
        assert len(bench.tasks) == len(bench.step_limits) == tasks and set(bench.step_limits.values()) == {steps}
        assert (bench.episodes, bench.success_rule, bench.convention, bench.protocol) == (50, "any_step", LIBERO, name)
        told = json.loads(json.dumps(bench.describe()))
        assert told["settle_steps"] == 10 and told["episodes"] == 50
        assert set(bench.experts) <= set(bench.tasks)
        assert benchmark(name) is bench
    assert PROTOCOLS["libero-10@1"].suite == "libero_10"
    assert coverage("libero-10@1", ["0", "7"], 50) == "2 of its 10 tasks: 0, 7"
    assert coverage("libero-10@1", ["0"], 20) == "1 of its 10 tasks: 0; 20 of 50 initial states"
    assert (
        coverage("calvin-abc-d@1", ["chain"], 30) == "the first 30 of 1,000 chains"
    )  # never the benchmark's name alone
    assert coverage("calvin-abc-d@1", ["chain"], 1000) == "all of it"
    assert PROTOCOLS["libero-10@1"].portion(20) == "20 of 50 initial states" and not PROTOCOLS["libero-10@1"].portion(
        50
    )


def test_every_simulator_s_protocols_hold_together() -> None:
    """What evaluation takes for granted of any simulator."""
    for name, bench in simulators().items():
        assert name == bench.protocol and set(bench.step_limits) >= set(bench.tasks)
        assert len(bench.action_limit) == bench.convention.size and bench.cameras and bench.state_names
        json.dumps(bench.describe(), allow_nan=False)
        assert set(bench.chosen(())) == set(bench.options) and ":" in bench.factory


def test_options_are_named_and_of_their_kind() -> None:
    bench = PROTOCOLS["libero-10@1"]
    assert bench.chosen(("crop=0.9", "settle=acting")) == {
        "settle": "acting", "crop": 0.9, "size": 256, "antialias": "on",
    }  # fmt: skip
    for word, message in (
        ("setle=acting", "did you mean 'settle'"),
        ("settle=later", "give still, acting"),
        ("size=big", "a value like 256"),
    ):
        with pytest.raises(InputError, match=message):
            bench.chosen((word,))


def test_what_is_missing_is_one_line_with_what_to_do(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "zero", "--benchmark", "libero-10@1", "--tasks", "0"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "make venv-libero" in line
    assert ".venv-libero/bin/python -m vlm4vla_core.sims.libero" in line and "VLM4VLA_SIM_ASSETS" in line
    assert main(["record", "libero-10@1", "--tasks", "0", "--episodes", "1", "--out", str(bare / "store")]) == 2
    assert "make venv-libero" in capsys.readouterr().err
    assert not list(bare.iterdir())


renderer = libero.renderer  # `bare` puts another in its place


def test_a_renderer_that_is_not_there_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # wants a display
    monkeypatch.setattr(libero, "renderer", renderer)
    (line,) = [line for line in benchmark("libero-10@1").missing() if "renderer" in line]
    assert "MUJOCO_GL=glfw" in line and "libosmesa6" in line


def test_assets_are_found_in_the_user_s_folder_the_package_and_the_download(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = bare / ".venv-libero/lib/python3.11/site-packages/libero"
    downloaded, own, mine = bare / ".cache/libero/assets", package / "libero/assets", bare / "mine/libero/assets"
    assert assets.folder() is None
    for place in (downloaded, own, mine):  # each goes before the last
        for part in assets.PARTS:
            assert assets.folder() != place
            (place / part).mkdir(parents=True)
        if place == mine:
            monkeypatch.setenv("VLM4VLA_SIM_ASSETS", str(bare / "mine"))
        assert assets.folder() == place
    assert assets.stand_ins(mine) == []
    (bare / "mine/libero/manifest.json").write_text('{"stand_ins": ["scenes/a.msh"]}')
    assert assets.stand_ins(mine) == ["scenes/a.msh"]
    assets.configure(bare / "config")
    lines = dict(line.split(": ") for line in (bare / "config/config.yaml").read_text().splitlines())
    assert lines["bddl_files"] == str(package / "libero/bddl_files") and lines["assets"] == str(mine)
    assert set(lines) == {"benchmark_root", "bddl_files", "init_states", "datasets", "assets"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "zero", "--benchmark", "libero-spacial@1"], "did you mean 'libero-spatial@1'"),
        (["evaluate", "zero", "--benchmark", "simpler-bridge@1"], "^[^@]*simpler-bridge@1 is not run here; it is"),
        (["evaluate", "zero", "--benchmark", "libero-10@1", "--tasks", "10"], "has no task '10'"),
        (["evaluate", "zero", "--benchmark", "libero-10@1", "--episodes", "51"], "has 50 initial states per task"),
        (["evaluate", "zero", "--benchmark", "libero-10@1", "--options", "crop"], "option crop .* cannot be ''"),
        (["evaluate", "zero", "--benchmark", "tabletop-tasks@1", "--shard", "3/2"], "give i/n with 1 <= i <= n"),
        (["evaluate", "zero", "--benchmark", "tabletop-tasks@1", "--workers", "0"], "--workers must be at least 1"),
        (["evaluate", "zero", "--benchmark", "tabletop-tasks@1", "--ensemble", "temporal"], "one action at a time"),
        (["record", "libero-goal@1", "--episodes", "1", "--out", "x"], "has no scripted expert"),
        (["record", "libero-10@1", "--tasks", "3", "--episodes", "1", "--out", "x"], "no scripted expert for task '3'"),
        (["record", "tabeltop", "--episodes", "1", "--out", "x"], "did you mean 'tabletop'"),
        (["record", "libero-10@1", "--episodes", "0", "--out", "x"], "--episodes has to be at least 1"),
        (["record", "libero-10@1", "--cameras", "front", "--episodes", "1", "--out", "x"], "has no camera 'front'"),
        (["record", "tabletop", "--options", "a=1", "--episodes", "1", "--out", "x"], "has no options"),
    ],
)
def test_bad_words_are_refused(bare: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    import re

    assert main(words) == 2
    line = capsys.readouterr().err
    assert re.search(message, line) and line.count("\n") == 1
    assert not list(bare.iterdir())
