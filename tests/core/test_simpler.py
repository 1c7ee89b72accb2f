"""SIMPLER-Bridge (ManiSkill 3's port) without the simulator: commands, scenes, the driver, what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlm4vla_core.errors import InputError
from vlm4vla_core.sims import simpler
from vlm4vla_core.sims.simpler import driver
from vlm4vla_core.sims.simpler.command import Commander, intrinsic_xyz
from vlm4vla_core.sims.simpler.expert import Seen, across

BENCH = simpler.PROTOCOLS["simpler-bridge-ms3@1"]


# --- commands -------------------------------------------------------------------------------------------


def test_rotations_against_scipy():
    rng = np.random.default_rng(0)
    angles = np.concatenate([rng.uniform(-np.pi, np.pi, (500, 3)), rng.uniform(-0.2, 0.2, (500, 3)), np.zeros((1, 3))])
    meant = Rotation.from_euler("xyz", angles)  # lower case: fixed axes
    sent = Rotation.from_euler("XYZ", intrinsic_xyz(angles))  # upper case: intrinsic
    assert (meant.inv() * sent).magnitude().max() < 1e-7
    np.testing.assert_allclose(intrinsic_xyz(angles[500:]), meant[500:].as_euler("XYZ"), atol=1e-12)
    # The reading without conversion is another rotation, by the second order of the angles.
    assert (meant.inv() * Rotation.from_euler("XYZ", angles)).magnitude()[500:1000].max() > 0.02


def test_command_keeps_translation_and_signs():
    command = Commander()(np.array([0.01, -0.02, 0.03, 0.0, 0.0, 0.1, 1.0]))
    np.testing.assert_allclose(command, [0.01, -0.02, 0.03, 0.0, 0.0, 0.1, 1.0], atol=1e-7)
    assert command.dtype == np.float32
    for bad in (np.full(7, np.nan), np.zeros(6)):
        with pytest.raises(ValueError, match="seven finite"):
            Commander()(bad)


def test_gripper_rules():
    wanted = [1, 1, 0, 1, 0.5, 1, 1, 1, 0.51, 0]

    def told(rule: str) -> list[int]:
        command = Commander(rule)
        return [int(command(np.array([0, 0, 0, 0, 0, 0, value]))[6]) for value in wanted]

    assert told("plain") == [1, 1, -1, 1, -1, 1, 1, 1, 1, -1]
    assert told("late-open") == [-1, 1, -1, -1, -1, -1, 1, 1, 1, -1]  # from the second in a row on
    with pytest.raises(ValueError, match="early"):
        Commander("early")


# --- the protocol ---------------------------------------------------------------------------------------


def test_protocol():
    told = BENCH.describe()
    json.dumps(told)
    assert BENCH.protocol == "simpler-bridge-ms3@1" and BENCH.episodes == 24
    assert sorted(told["tasks"].values()) == [60, 60, 60, 120] and told["success_rule"] == "last_step"
    assert "not the published benchmark" in told["title"] and "simpler-bridge@1" in told["not"]
    assert BENCH.chosen(()) == {"gripper": "plain"}
    assert BENCH.chosen(("gripper=late-open",)) == {"gripper": "late-open"}
    with pytest.raises(InputError, match="gripper"):
        BENCH.chosen(("gripper=early",))


@pytest.mark.parametrize("task", BENCH.tasks)
def test_practice_scenes(task):
    scenes = [simpler.practice_scene(task, episode) for episode in range(40)]
    again, _ = simpler.practice_scene(task, 7)
    np.testing.assert_array_equal(scenes[7][0], again)
    places = np.stack([position for position, _ in scenes])  # (40, 2, 3)
    assert len(np.unique(places[:, 0, :2], axis=0)) == 40
    if "eggplant" not in task:
        half = 0.1 if "stack" in task else 0.075
        assert (np.abs(places[..., :2] - [-0.16, 0.0]) <= half + 1e-12).all()
        assert np.linalg.norm(places[:, 0, :2] - places[:, 1, :2], axis=1).min() >= 0.08
        corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])  # the fixed episodes stand on these
        fixed = np.concatenate([corners * half, corners * half / 2]) + np.array([-0.16, 0.0])
        off = np.linalg.norm(places[:, 0, None, :2] - fixed, axis=-1).min(1)
        assert (off > 1e-4).all()
    for _, turns in scenes:
        np.testing.assert_allclose(np.linalg.norm(turns, axis=1), 1.0, atol=1e-12)


def test_fingers_close_across_the_narrow_side():
    """Closed form: with the fingers along y and the long side at an angle from x, the turn is that angle."""
    none = np.zeros(3)

    def seen(angle: float, box: tuple[float, float, float]) -> Seen:
        turned = Rotation.from_euler("z", angle).as_quat()
        still = np.array([0.0, 0.0, 0.0, 1.0])
        return Seen(none, still, none, still, none, turned, np.array(box), none, np.ones(3), 0.037, False)

    for angle in (0.0, 0.5, -1.2, 1.5):
        assert across(seen(angle, (0.1, 0.03, 0.04))) == pytest.approx(angle, abs=1e-12)
        assert across(seen(angle + np.pi, (0.1, 0.03, 0.04))) == pytest.approx(angle, abs=1e-12)
    assert across(seen(np.pi / 2 + 0.1, (0.03, 0.03, 0.03))) == pytest.approx(0.1, abs=1e-12)  # a cube: any side does


# --- what is missing ------------------------------------------------------------------------------------


def test_missing_assets_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    lines = [line for line in BENCH.missing() if "assets" in line]
    assert len(lines) == 1 and str(tmp_path) in lines[0] and "MS_ASSET_DIR" in lines[0] and "more" in lines[0]
    assert not any("\n" in line for line in BENCH.missing())


def test_where_assets_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("MS_ASSET_DIR", raising=False)
    monkeypatch.setenv("VLM4VLA_SIM_ASSETS", str(tmp_path))
    assert simpler.assets() == tmp_path / "simpler" / "data"
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "own"))
    assert simpler.assets() == tmp_path / "own" / "data"
    for name in ("MS_ASSET_DIR", "VLM4VLA_SIM_ASSETS"):
        monkeypatch.delenv(name)
    assert simpler.assets().parts[-2:] == (".maniskill", "data")


def test_stand_ins_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    stage = simpler.scenes() / "stages" / "bridge_table_1_v1.glb"
    stage.parent.mkdir(parents=True)
    stage.write_bytes(b"x" * 1216)
    assert simpler.stand_ins("widowx_stack_cube") == ["the table under the photo"]
    stage.write_bytes(b"x" * (5 << 20))
    assert simpler.stand_ins("widowx_stack_cube") == []
    assert simpler.stand_ins("widowx_put_eggplant_in_basket") == ["the eggplant's look"]
    assert "stand_in_assets" in BENCH.describe()


@pytest.mark.skipif("VLM4VLA_SIM_ASSETS" not in os.environ, reason="VLM4VLA_SIM_ASSETS is not set")
def test_the_shared_assets_are_complete(monkeypatch):
    monkeypatch.delenv("MS_ASSET_DIR", raising=False)
    assert not [line for line in BENCH.missing() if "assets" in line]


# --- the driver -----------------------------------------------------------------------------------------


def lavapipe(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libvulkan_lvp.so").write_bytes(b"\x7fELF...llvmpipe\0Mesa " + version.encode() + b"\0 (LLVM)")
    manifest = folder / "lvp_icd.x86_64.json"
    manifest.write_text(json.dumps({"ICD": {"library_path": "./libvulkan_lvp.so"}, "file_format_version": "1.0.0"}))
    return manifest


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No driver but those that a test puts into its folder."""
    for variable in driver.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(driver, "prepared", list)
    monkeypatch.setattr(driver, "_SYSTEM", (tmp_path,))
    return tmp_path


def test_old_driver_is_told_with_advice(alone):
    assert "no lavapipe" in driver.missing()[0]
    with pytest.raises(InputError, match="make venv-simpler"):
        driver.activate()
    lavapipe(alone, "22.3.6")
    (line,) = driver.missing()
    assert "Mesa 22.3" in line and "25.0" in line and "make venv-simpler" in line and "\n" not in line
    lavapipe(alone, "25.0.7")
    assert driver.missing() == []


def test_driver_is_set_for_sapien(alone, monkeypatch):
    manifest = lavapipe(alone, "26.1.0-devel")
    monkeypatch.setenv("VK_ICD_FILENAMES", "")  # so that the change is undone
    driver.activate()
    assert os.environ["VK_ICD_FILENAMES"] == str(manifest)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/no/such.json")
    assert "/no/such.json" in driver.missing()[0]
    for content in ("junk", "[]", '{"ICD": {"library_path": "./gone.so"}}'):
        (alone / "mine.json").write_text(content)
        monkeypatch.setenv("VK_ICD_FILENAMES", f"{manifest}:{alone / 'mine.json'}")
        (line,) = driver.missing()
        assert f"VK_ICD_FILENAMES names {alone / 'mine.json'}, no manifest of a driver" in line
    (alone / "mine.json").write_text('{"ICD": {"library_path": "libGLX_of_a_gpu.so.0"}}')  # the loader's business
    assert driver.missing() == []
    told = str(driver.failed(RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver\nmore")))
    assert "mine.json" in told and "ErrorIncompatibleDriver" in told and "\n" not in told


def test_broken_manifests_are_passed_over(alone):
    (alone / "lvp_icd.a.json").write_text("{")
    (alone / "lvp_icd.b.json").write_text('{"ICD": {"library_path": "./gone.so"}}')
    (alone / "lvp_icd.c.json").write_text("[]")
    assert list(driver.drivers()) == []


DEB822 = """Types: deb
# a comment with a colon: here
URIs: http://one.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /keys/one.gpg

Types: deb deb-src
URIs: http://two.example/security
Suites: bookworm-security
Components: main
"""


def test_backports_take_mirror_and_key_of_the_machine(tmp_path):
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    with pytest.raises(InputError, match="bookworm"):
        driver.backports(tmp_path, "bookworm")
    line = "deb [arch=amd64 signed-by=/keys/three.gpg] http://three.example/debian bookworm main contrib\n"
    (tmp_path / "sources.list").write_text(
        "# deb http://no.example bookworm main\ndeb-src http://no.example bookworm main\n" + line
    )
    source, suite = driver.backports(tmp_path, "bookworm")
    assert suite == "bookworm-backports"
    assert source.splitlines() == [
        "Types: deb", "URIs: http://three.example/debian", "Suites: bookworm bookworm-backports", "Components: main",
        "Signed-By: /keys/three.gpg",
    ]  # fmt: skip
    (parts / "debian.sources").write_text(DEB822)
    source, _ = driver.backports(tmp_path, "bookworm")
    assert "URIs: http://one.example/debian\n" in source and "Signed-By: /keys/one.gpg" in source
    (parts / "debian.sources").write_text("Enabled: no\n" + DEB822)
    assert "three.example" in driver.backports(tmp_path, "bookworm")[0]


def test_inline_key_goes_along(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    stanza = f"Types: deb\nURIs: http://one.example/\nSuites: trixie\nComponents: main\nSigned-By:{key}\n"
    (tmp_path / "sources.list.d" / "a.sources").write_text(stanza)
    assert driver.backports(tmp_path, "trixie")[0].endswith(f"Signed-By: {key}\n")


def test_dependencies():
    fields = "Pre-Depends: libc6 (>= 2.34)\nDepends: libdrm2 (>= 2.4.121), libllvm15, a-b | c, libstdc++6 (>= 11)\n"
    assert driver.depends(fields) == {"libc6", "libdrm2", "libllvm15", "a-b", "libstdc++6"}
