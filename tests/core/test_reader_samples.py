"""Golden numbers of the real samples: the readers against h5py, numpy and pandas reading the same files alone."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm4vla_core.episodes.formats import detect, open_source
from vlm4vla_core.episodes.writer import Episode

pytestmark = pytest.mark.samples


def read(path: Path, transform: str = "", **options: Any) -> list[Episode]:
    source = open_source(detect(path), path, **options)
    found = [
        one
        for unit in source.units(source.splits)
        for one in source.episodes(unit, source.cameras, transform or source.transforms[0])
    ]
    return [one for one in found if isinstance(one, Episode)]


def digest(arrays: list[Any]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def test_libero(samples: Path):
    found = read(samples / "libero_hdf5_sim", "libero")
    action, state = (np.concatenate([getattr(one, name) for one in found]) for name in ("action", "state"))
    pictures = [one.images["agentview_rgb"] for one in found]
    assert (action.shape, state.shape) == ((43, 7), (43, 8))
    expected = [0.1052937254, 0.1236020553, 0.0585185343, 0.0128272452, 0.0142387363, 0.0010126783, 0.4418604651]
    np.testing.assert_allclose(action.mean(0, np.float64), expected, rtol=1e-6)
    expected = [-0.1925876886, 0.0059859108, 1.1775039878, 3.1595106679, 0.0087759795, -0.0961229468]
    np.testing.assert_allclose(state.mean(0, np.float64), [*expected, 0.0231066451, -0.0230342145], rtol=1e-6)
    assert digest(pictures) == "c230151b1b679ddc"


def test_calvin(samples: Path, tmp_path: Path):
    frames = sorted((samples / "calvin_npz").glob("*.npz"))
    part = tmp_path / "training"
    (part / "lang_annotations").mkdir(parents=True)
    for path in frames:
        shutil.copy(path, part)
    spans = [(int(path.stem[8:]),) * 2 for path in frames]
    language = {"ann": ["one", "two"], "task": ["a", "b"], "emb": np.zeros((2, 1, 384), np.float32)}
    told: Any = {"language": language, "info": {"episodes": [], "indx": spans}}
    np.save(part / "lang_annotations" / "auto_lang_ann.npy", told)
    found = read(tmp_path)
    action, state = (np.concatenate([getattr(one, name) for one in found]) for name in ("action", "state"))
    expected = [0.0138214445, -0.2038852950, -0.0015190793, -0.0774328373, 0.0554194140, -0.0178222335, 0]
    np.testing.assert_allclose(action.mean(0, np.float64), expected, rtol=1e-6)
    expected = [0.0650336044, -0.0626828671, 0.5485422313, 0.0298551321, -0.0612805169, 1.5154906511, 0.0602867622]
    np.testing.assert_allclose(state.mean(0, np.float64)[:7], expected, rtol=1e-6)
    assert [digest([one.images["rgb_static"]]) for one in found] == ["d82c86013056c317", "e050cdc1a4d7bf4f"]
    assert [digest([one.images["rgb_gripper"]]) for one in found] == ["60e716b6faed9b41", "1a11470de098db16"]


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_lerobot(samples: Path, version: str):
    found = read(samples / f"lerobot_{version}_unitree_g1")
    action, state = (np.concatenate([getattr(one, name) for one in found]) for name in ("action", "state"))
    assert (action.shape, state.shape) == ((778, 26), (778, 26))
    expected = [-0.7883011680, 0.4389377839, -0.5743324366, 1.2516171917]
    np.testing.assert_allclose(action.mean(0, np.float64)[:4], expected, rtol=1e-6)
    np.testing.assert_allclose(
        [action.mean(dtype=np.float64), state.mean(dtype=np.float64)], [0.3516400921, 0.3500681044], rtol=1e-6
    )
    assert digest([action]) == "bc9c1798b7ebc39c"


def test_bridge(samples: Path):
    """The raw range and mean that the sample's own description states, in their printed digits."""
    action = np.stack([one.action for one in read(samples / "bridge_rlds_octo", "none")[:25]])
    assert action.shape == (25, 10, 7)
    assert np.abs(action[:, 0, :6]).max() < 1e-6
    low, high = action.min((0, 1)), action.max((0, 1))
    np.testing.assert_allclose(low, [-0.0190, -0.0293, -0.0205, -0.1596, -0.1174, -0.2543, 0], atol=5.1e-5)
    np.testing.assert_allclose(high, [0.0180, 0.0122, 0.0328, 0.1330, 0.0724, 0.0674, 1], atol=5.1e-5)
    mean = action.mean((0, 1), np.float64)
    np.testing.assert_allclose(mean, [0.00159, -0.00097, -0.00294, -0.00994, -0.00485, -0.00533, 0.7392], atol=5.1e-6)
