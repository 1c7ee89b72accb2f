"""Stored losses of every objective and two families (tests/oracles/golden_losses.py) come out again, to 1e-5."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from toys import toy_store

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
_spec = importlib.util.spec_from_file_location("golden_losses", ORACLES / "golden_losses.py")
assert _spec and _spec.loader
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_losses(data: Path, tmp_path: Path, case: str):
    expected = json.loads((ORACLES / "golden_losses.json").read_text())[case]
    assert golden.losses(case, data, tmp_path / "run") == pytest.approx(expected, rel=1e-5)
