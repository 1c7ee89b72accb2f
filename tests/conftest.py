"""Shared fixtures: one torch thread, offline hubs, and the folders of real sample data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: default threading is 20x slower on small models
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of small real robot data; skips where it is not configured."""
    folder = os.environ.get("VLM4VLA_SAMPLES")
    if not folder:
        pytest.skip("VLM4VLA_SAMPLES is not set: it names the folder of small real robot data")
    if not Path(folder).is_dir():
        pytest.fail(f"VLM4VLA_SAMPLES names a folder that does not exist: {folder}")
    return Path(folder)
