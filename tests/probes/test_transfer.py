"""Readouts carried from one model's features to another's: planted features, and a literal ridge."""

from __future__ import annotations

import numpy as np
import pytest

from probes.grid import ALPHAS
from probes.readout import split
from probes.similarity import cka
from probes.transfer import transfer
from vlm4vla_core.errors import InputError

FRAMES, WIDTH = 600, 8
EPISODES = np.repeat(np.arange(60), 10)


def planted() -> tuple[dict, np.ndarray]:
    """A equals the base up to noise, C is the base turned: the same knowledge in other places."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(FRAMES, WIDTH))
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    target = base[:, :2] + 0.1 * rng.normal(size=(FRAMES, 2))
    models = {"base": base, "A": base + 0.01 * rng.normal(size=base.shape), "C": base @ turn}
    return {name: {"vision.0": value} for name, value in models.items()}, target


def test_a_turned_copy_keeps_what_it_knows_and_loses_the_readout() -> None:
    models, target = planted()
    found = transfer(models, target, EPISODES, pairs=[("A", "C")], resamples=0)
    frame = found.to_frame().set_index(["model", "readout"])
    assert len(frame) == 5 and frame.loc[("A", "transferred"), "score"] > 0.97
    assert frame.loc[("C", "transferred"), "score"] < 0.5 and frame.loc[("C", "own"), "score"] > 0.97
    assert (frame["shuffled"] < 0.1).all() and frame.loc[("base", "transferred"), "change"] == 0
    lost = frame.loc[("C", "transferred")]
    assert lost["change"] == pytest.approx(lost["score"] - frame.loc[("base", "transferred"), "score"])
    assert lost["change_high"] < 0 and abs(frame.loc[("C", "own"), "change"]) < 0.01
    alike = found.similarity_frame().set_index(["a", "b"])
    assert list(alike.index) == [("base", "A"), ("base", "C"), ("A", "C")] and (alike["floor"] < 0.1).all()
    assert alike.loc[("base", "C"), "cka"] == pytest.approx(1, abs=1e-6)
    assert alike.loc[("A", "C"), "cka"] == pytest.approx(cka(models["A"]["vision.0"], models["C"]["vision.0"]).value)


def test_the_transferred_readout_is_the_bases_own() -> None:
    """Its predictions equal those of a literal ridge fitted to the base's frames and applied to C's."""
    models, target = planted()
    found = transfer(models, target, EPISODES, resamples=0).readouts["C", "vision.0", "transferred"]
    parts = split(EPISODES)
    base, c = models["base"]["vision.0"], models["C"]["vision.0"]
    both = np.concatenate(parts[:2])
    predictions = []
    for rows in (parts.fit, both):  # columns may be scaled by either
        mean, sd = base[rows].mean(0), base[rows].std(0)
        x = (base[both] - mean) / sd
        x, y = x - x.mean(0), target[both]
        w = np.linalg.solve(x.T @ x + found.alpha * len(x) * np.eye(WIDTH), x.T @ (y - y.mean(0)))
        shift = ((base[both] - mean) / sd).mean(0)
        predictions.append(((c[parts.test] - mean) / sd - shift) @ w + y.mean(0))
    assert found.alpha in ALPHAS
    assert min(np.abs(found.predicted - one).max() for one in predictions) < 1e-3


def test_other_frames_or_layers_are_refused() -> None:
    models, target = planted()
    with pytest.raises(InputError, match="the base's are"):
        transfer({**models, "C": {"vision.0": np.ones((FRAMES, 3))}}, target, EPISODES)
    with pytest.raises(InputError, match=r"layers vision\.1, the base has vision\.0"):
        transfer({**models, "C": {"vision.1": models["C"]["vision.0"]}}, target, EPISODES)
