"""The front door: every verb answers --help quickly, and bad words exit 2 with one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlm4vla_core.cli import VERBS, main

HEAVY = ("torch", "transformers", "pandas", "scipy", "matplotlib", "captum", "papermill", "nbconvert")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_exits_0(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"vlm4vla {verb}" in out
    assert "Example" in out


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_no_verb_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2


def test_a_misspelt_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recrod"]) == 2
    line = capsys.readouterr().err
    assert "did you mean 'record'?" in line
    assert line.count("\n") == 1


def test_an_unknown_flag_exits_2() -> None:
    assert main(["correlate", "--no-such-flag"]) == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vlm4vla_core.cli import VERBS, main\n"
        "codes = [main([verb, '--help']) for verb in VERBS]\n"
        f"assert codes == [0] * len(VERBS), codes\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_core_imports_nothing_of_the_probes() -> None:
    code = (
        "import importlib, pkgutil, sys, vlm4vla_core\n"
        "for module in pkgutil.walk_packages(vlm4vla_core.__path__, 'vlm4vla_core.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'probes'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_exported_names_are_no_modules_whatever_was_imported_before() -> None:
    code = (
        "import importlib, pkgutil, types, vlm4vla_core\n"
        "for module in pkgutil.walk_packages(vlm4vla_core.__path__, 'vlm4vla_core.'):\n"
        "    importlib.import_module(module.name)\n"
        "for name in vlm4vla_core.__all__:\n"
        "    assert not isinstance(getattr(vlm4vla_core, name), types.ModuleType), name\n"
        "assert vlm4vla_core.families() == vlm4vla_core.families()\n"
        "vlm4vla_core.tiny(image_size=56), vlm4vla_core.tiny(image_size=56)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_impossible_outputs_are_refused_before_the_work(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["correlate", "--json", str(tmp_path)]) == 2
    assert "--json names a folder" in capsys.readouterr().err
    assert main(["inspect", "nowhere", "--html", str(tmp_path)]) == 2
    assert "--html names a folder" in capsys.readouterr().err
    assert main(["record", "tabletop", "--episodes", "1", "--out", "never", "--video", str(tmp_path)]) == 2
    assert "--video names a folder" in capsys.readouterr().err
    assert main(["record", "tabletop", "--episodes", "1", "--out", str(tmp_path / "file")]) == 2
    assert "--out names a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
