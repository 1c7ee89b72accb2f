"""Whole-or-absent folders: what a reader relies on after a crash, a damaged file or a newer version."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError


def _product(folder: Path, text: str = "hello", **config: object) -> dict:
    with folders.new_folder(folder, "thing") as temporary:
        (temporary / "a.txt").write_text(text)
        return folders.write_manifest(temporary, "thing", config=config, inputs={"source": "abc"})


def test_a_killed_write_leaves_the_old_folder_and_no_new_one(tmp_path: Path) -> None:
    _product(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), folders.new_folder(tmp_path / "out", "thing") as temporary:
        (temporary / "a.txt").write_text("new")
        raise RuntimeError("killed")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["run.json", "thesis.txt", "checkpoints/step-000000/manifest.json"])
def test_what_is_no_product_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(InputError, match=r"something that is no thing.*give another --out"):
        _product(tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"
    (tmp_path / "empty").mkdir()
    _product(tmp_path / "empty")


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    _product(tmp_path / "disk", "old")
    (tmp_path / "out").symlink_to("disk")
    _product(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a.txt").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_the_commit_is_this_project_s_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path / "site-packages")
    assert folders.provenance()["commit"] == "unknown"
    monkeypatch.setattr(folders, "project_root", lambda: tmp_path)
    assert len(folders.provenance()["commit"]) == 40


def test_a_product_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    _product(tmp_path / "out")
    with pytest.raises(InputError, match="something that is no rollouts folder"):
        folders.new_folder(tmp_path / "out", "rollouts").__enter__()
    with pytest.raises(InputError, match="made with other settings"):
        folders.refuse_other(tmp_path / "out", "thing")
    assert (tmp_path / "out" / "a.txt").read_text() == "hello"
    (tmp_path / "out" / "a.txt").unlink()
    folders.refuse_other(tmp_path / "out", "thing")  # a damaged one may be made again


def test_what_a_kill_9_left_is_swept_up_next_time(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom vlm4vla_core import folders\n"
        "with folders.new_folder(Path(sys.argv[1]), 'thing') as folder:\n"
        "    (folder / 'a.txt').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    (tmp_path / ".out.elsewhere-1.tmp").mkdir()  # another machine's, maybe alive
    _product(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.elsewhere-1.tmp", "out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    _product(tmp_path / "out", "old")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "out").rename(tmp_path / f".out.{platform.node()}-{dead.pid}.old")
    with pytest.raises(RuntimeError), folders.new_folder(tmp_path / "out", "thing"):
        raise RuntimeError("killed again")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_manifest_lists_every_file_with_its_true_hash(tmp_path: Path) -> None:
    manifest = _product(tmp_path / "out")
    assert manifest["files"]["a.txt"]["bytes"] == 5
    assert manifest["files"]["a.txt"]["sha256"] == hashlib.sha256(b"hello").hexdigest()[:16]
    assert manifest["made_by"]["versions"]["numpy"]


def _edit(folder: Path, **changes: object) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**told, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "a.txt").unlink(), "missing"),
        (lambda folder: (folder / "a.txt").write_text("hell"), "4 bytes, the manifest says 5"),
        (lambda folder: (folder / "a.txt").write_text("jello"), "content differs"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "expected a thing"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "vlm4vla-other"}'), "vlm4vla-other"),
        (
            lambda folder: _edit(folder, version=99),
            "newer vlm4vla",
        ),
        (lambda folder: _edit(folder, version="one", inputs=None), "lacks a proper version, inputs"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    _product(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=message) as caught:
        folders.read_manifest(tmp_path / "out", "thing", hashes=True)
    assert str(tmp_path / "out") in str(caught.value)
    assert not folders.current(tmp_path / "out", "thing", config={}, inputs={"source": "abc"}) or message == (
        "content differs"
    )


def test_current_only_for_the_same_config_and_inputs(tmp_path: Path) -> None:
    _product(tmp_path / "out", size=(1, 2), path=Path("x"))
    same = {"size": (1, 2), "path": Path("x")}
    assert folders.current(tmp_path / "out", "thing", config=same, inputs={"source": "abc"})
    assert not folders.current(tmp_path / "out", "thing", config={**same, "size": (1, 3)}, inputs={"source": "abc"})
    assert not folders.current(tmp_path / "out", "thing", config=same, inputs={"source": "abd"})
    assert not folders.current(tmp_path / "other", "thing", config=same, inputs={"source": "abc"})


def test_json_is_atomic_and_has_no_nan(tmp_path: Path) -> None:
    folders.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folders.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_fingerprint_ignores_key_order() -> None:
    assert folders.fingerprint({"a": 1, "b": [2]}) == folders.fingerprint({"b": [2], "a": 1})
    assert folders.fingerprint({"a": 1}) != folders.fingerprint({"a": 2})


def test_shipped_names_what_is_missing() -> None:
    assert folders.shipped("data/paper").is_dir()
    with pytest.raises(InputError, match="no/such"):
        folders.shipped("no/such")


def test_work_of_dead_processes_is_swept_and_that_of_others_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"7.{platform.node()}-{dead.pid}", f"7.{platform.node()}-1", "7.other-machine-99999", "7"]
    for name in names:
        (tmp_path / name).mkdir()
    folders.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def test_fingerprints_that_are_known_are_not_taken_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    manifest = folders.write_manifest(tmp_path, "thing", config={}, inputs={}, known={"a": "0123"})
    assert manifest["files"]["a"]["sha256"] == "0123"
    assert manifest["files"]["b"]["sha256"] == hashlib.sha256(b"b").hexdigest()[:16]


@pytest.mark.parametrize("text", ["{", "\xff", "[" * 100_000, "1" * 5_000])
def test_what_is_no_json_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"not valid JSON.*a\.json"):
        folders.read_json(tmp_path / "a.json")
