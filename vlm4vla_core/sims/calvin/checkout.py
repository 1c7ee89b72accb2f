"""A user's own, unmodified checkout of `mees/calvin` with its `calvin_env`: found, described, imported.

`CALVIN_ROOT` names it (else the folder `calvin` of `VLM4VLA_SIM_ASSETS`). Nothing of it is installed: what its modules
import and is missing here is replaced while they are imported by stand-ins that do what the physics needs, which is
little. Scene, robot and cameras are composed from the checkout's configuration files, without Hydra.

Trap: the two known commits of calvin_env score differently (at the one that `mees/calvin` pins, the LED's button
forgets at a reset that the light is on), so the commit stands in every result.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from vlm4vla_core.errors import InputError

VARIABLE = "CALVIN_ROOT"
SCENES = ("A", "B", "C", "D")
_MODELS = Path("calvin_models/conf")
_NEEDED = ("calvin_env/calvin_env/envs/play_table_env.py", f"{_MODELS}/annotations/new_playtable_validation.yaml")
_CLONE = "git clone --recurse-submodules https://github.com/mees/calvin"


def named() -> Path | None:
    """The folder that the environment names, whether or not it holds a checkout; None when it names none."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if assets := os.environ.get("VLM4VLA_SIM_ASSETS"):
        return Path(assets) / "calvin" if (Path(assets) / "calvin").is_dir() else None
    return None


def missing() -> list[str]:
    """What is missing of the checkout, one line; nothing when it is there."""
    root = named()
    if root is None:
        return [f"CALVIN's checkout: `{_CLONE}`, and name the folder by --calvin-root or {VARIABLE}"]
    if gone := [name for name in _NEEDED if not (root / name).is_file()]:
        fix = "git submodule update --init" if gone == [_NEEDED[0]] else _CLONE
        return [f"CALVIN's checkout in {root} has no {gone[0]}: `{fix}`"]
    return []


def find() -> Path:
    """The checkout. Raises InputError when there is none."""
    root = named()
    if gone := missing():
        raise InputError(gone[0], where=root or VARIABLE)
    assert root is not None
    return root.resolve()


def commit(folder: Path) -> str:
    """The commit of a work tree, with "+" when its files were changed; "unknown" when it is none."""

    def ask(*words: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return "unknown"
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@dataclass(frozen=True)
class Checkout:
    """An imported checkout. env_class: its simulation. oracle: its task detector. asked: task -> the phrases of the
    benchmark. taught: task -> the phrases of the training data. commit: calvin_env's."""

    root: Path
    commit: str
    env_class: Any
    oracle: Any
    asked: dict[str, list[str]]
    taught: dict[str, list[str]]

    def config(self, scene: str) -> Any:
        """Robot, scene and both cameras, composed from the checkout's files as its own recordings were."""
        from omegaconf import OmegaConf

        conf = self.root / "calvin_env" / "conf"
        robot = OmegaConf.merge(*(_load(conf / f"robot/{name}.yaml") for name in ("panda", "panda_longer_finger")))
        robot.pop("defaults", None)
        cameras = {name: _load(conf / f"cameras/cameras/{name}.yaml") for name in ("static", "gripper")}
        table = _load(conf / f"scene/calvin_scene_{scene}.yaml")
        return OmegaConf.create({"data_path": "data", "robot": robot, "scene": table, "cameras": cameras})

    def recorded_as(self, scene: str, *, egl: bool) -> str:
        """What the benchmark's own tools read as `.hydra/merged_config.yaml` beside the frames of a split, as YAML."""
        from omegaconf import OmegaConf

        world = OmegaConf.merge(_load(self.root / "calvin_env/conf/env/play_table_env.yaml"), {"use_egl": egl})
        return OmegaConf.to_yaml(OmegaConf.merge(self.config(scene), {"use_vr": False, "env": world}))

    def make(self, scene: str, *, egl: bool) -> Any:
        """A simulation of one scene. One per process: some of calvin_env's calls name no physics client."""
        config = self.config(scene)
        with quiet():
            return self.env_class(
                robot_cfg=config.robot, scene_cfg=config.scene, cameras=config.cameras, seed=0, use_vr=False,
                show_gui=False, bullet_time_step=240.0, control_freq=30, use_scene_info=True, use_egl=egl,
            )  # fmt: skip


def open_checkout() -> Checkout:
    """Import the checkout. Raises InputError when it is not there, or pybullet or omegaconf are not."""
    root = find()
    found, handler = commit(root / "calvin_env"), sys.excepthook
    with _stand_ins():
        sys.path.insert(0, str(root / "calvin_env"))
        try:
            tables: Any = importlib.import_module("calvin_env.envs.play_table_env")
            tasks = importlib.import_module("calvin_env.envs.tasks")
            for part in ("robot.robot", "scene.play_table_scene", "camera.static_camera", "camera.gripper_camera"):
                importlib.import_module(f"calvin_env.{part}")
        except ModuleNotFoundError as error:
            fix = "run `make venv-calvin` and use .venv-calvin/bin/vlm4vla"
            raise InputError(f"CALVIN needs {error.name}, which is not installed", where=root, fix=fix) from None
        finally:
            sys.path.remove(str(root / "calvin_env"))
            sys.excepthook = handler  # one commit installs its own
    tables.get_git_commit_hash = lambda *_: found  # its own raises outside a git work tree
    conf = root / _MODELS
    oracle = tasks.Tasks(_load(conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml").tasks)
    asked, taught = (_load(conf / f"annotations/new_playtable{tail}.yaml") for tail in ("_validation", ""))
    return Checkout(root, found, tables.PlayTableSimEnv, oracle, _phrases(asked), _phrases(taught))


def _phrases(config: Any) -> dict[str, list[str]]:
    return {str(task): [str(text) for text in texts] for task, texts in config.items()}


def _load(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.load(path)


@contextmanager
def quiet() -> Iterator[None]:
    """No words on standard output, not even PyBullet's own, which come from C."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
        sys.stdout.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand-ins, for the time of an import, for the packages that calvin_env imports and that are not installed."""
    seeding = SimpleNamespace(np_random=lambda seed: (np.random.Generator(np.random.PCG64(seed)), seed))
    utils = SimpleNamespace(seeding=seeding)
    offered: dict[str, dict[str, Any]] = {
        "gym": {"Env": object, "utils": utils}, "gym.utils": vars(utils), "gym.utils.seeding": vars(seeding),
        "hydra": {"main": lambda **_: lambda function: function, "utils": SimpleNamespace(instantiate=_instantiate)},
        "git": {}, "quaternion": {}, "cv2": {}, "rich": {}, "rich.traceback": {"install": lambda **_: None},
    }  # fmt: skip
    absent = {name for name in offered if "." not in name and not _installed(name)}
    added = {name: members for name, members in offered.items() if name.split(".")[0] in absent}
    for name, members in added.items():
        module = ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in added:  # or others would take them for the real ones
            sys.modules.pop(name, None)


def _installed(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _instantiate(config: Any, **more: Any) -> Any:
    """What hydra.utils.instantiate does for calvin_env: call what `_target_` names with the rest as keywords."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True)
    module, _, name = plain.pop("_target_").rpartition(".")
    plain.pop("_recursive_", None)
    # calvin_env writes numpy numbers into the lists that it is given, which OmegaConf allows only when told so.
    given = OmegaConf.create(plain, flags={"allow_objects": True})
    return getattr(importlib.import_module(module), name)(**{key: given[key] for key in given}, **more)
