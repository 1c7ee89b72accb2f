"""Action conversion, chunks played out over time, and the shortcut checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlm4vla_core.action_conversion import converter
from vlm4vla_core.actions import BRIDGE, CALVIN, LIBERO, TABLETOP
from vlm4vla_core.actors import PolicyActor, make_actor
from vlm4vla_core.errors import InputError
from vlm4vla_core.playback import Playback
from vlm4vla_core.sims import benchmark

# What OpenVLA's RLDS loader makes of LIBERO's gripper: 1 open, 0 closed.
RLDS = replace(LIBERO, gripper_open=1.0, gripper_closed=0.0)


def test_the_gripper_of_rlds_policies_becomes_libero_s_own() -> None:
    convert, told = converter(RLDS, LIBERO)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 7))
    actions[:, -1] = [0.0, 1.0, 0.2, 0.9, 0.51]
    np.testing.assert_array_equal(convert(actions)[:, :-1], actions[:, :-1])
    # the published evaluation: env value = -(2 (g > 0.5) - 1)
    np.testing.assert_array_equal(convert(actions)[:, -1], -(2.0 * (actions[:, -1] > 0.5) - 1))
    assert told == "gripper_open 1.0 against -1.0; gripper_closed 0.0 against 1.0"
    same, nothing = converter(LIBERO, LIBERO)
    assert nothing == "" and same(actions) is actions


def test_scaling_and_rotation_convert_exactly_both_ways() -> None:
    """Euler angles in radians against the axis-angle shares of 0.5 rad of OSC, by scipy's rotations."""
    metric = replace(BRIDGE, frame=LIBERO.frame, control_hz=LIBERO.control_hz, units=("m",) * 3 + ("rad",) * 3 + ("1",))
    there, told = converter(metric, LIBERO)
    back, _ = converter(LIBERO, metric)
    rng = np.random.default_rng(1)
    actions = np.concatenate([rng.uniform(-0.05, 0.05, (50, 3)), rng.uniform(-0.4, 0.4, (50, 3)), np.ones((50, 1))], 1)
    moved = there(actions)
    np.testing.assert_allclose(moved[:, :3], actions[:, :3] / 0.05, rtol=1e-12)
    turned = Rotation.from_rotvec(moved[:, 3:6] * 0.5).as_matrix()
    np.testing.assert_allclose(turned, Rotation.from_euler("xyz", actions[:, 3:6]).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(back(moved), actions, atol=1e-9)
    assert "rotation euler_xyz against axis_angle" in told and "scaling" in told and "names" not in told


@pytest.mark.parametrize("changed", [{"frame": "world"}, {"control_hz": 10.0}, {"relative": False}, {"scaling": "odd"}])
def test_what_cannot_be_converted_exactly_is_refused(changed: dict[str, Any]) -> None:
    (name,) = changed
    with pytest.raises(InputError, match=f"do not mean what the benchmark expects: .*{name}"):
        converter(replace(RLDS, **changed), LIBERO, where="run")
    with pytest.raises(InputError, match="frame"):
        converter(CALVIN, LIBERO)


def test_chunks_are_played_out_and_new_words_end_them() -> None:
    play = Playback(TABLETOP, 2)
    chunk = np.arange(21.0).reshape(3, 7)
    assert play.wants(False)
    play.add(chunk)
    assert [play.next()[0], play.wants(False), play.next()[0], play.wants(False)] == [0, False, 7, True]
    play.add(chunk + 100)
    assert play.next()[0] == 100 and not play.wants(False) and play.wants(True)
    play.add(chunk + 200)
    assert play.next()[0] == 200


def test_temporal_ensembling_is_act_s_weighted_mean() -> None:
    rng, chunk, execute = np.random.default_rng(2), 4, 1
    chunks = rng.standard_normal((6, chunk, 7))
    chunks[..., -1] = chunks[..., -1] > 0
    play, got = Playback(TABLETOP, execute, "temporal"), []
    for t in range(6):
        assert play.wants(False)
        play.add(chunks[t])
        got.append(play.next())
    for t in range(6):  # literally: all predictions of moment t, oldest first, exp(-0.01 i)
        said = [chunks[s][t - s] for s in range(6) if 0 <= t - s < chunk]
        weights = np.exp(-0.01 * np.arange(len(said)))
        expected = sum(w * one for w, one in zip(weights, said, strict=True)) / weights.sum()
        np.testing.assert_allclose(got[t][:-1], expected[:-1], rtol=1e-12)
        assert got[t][-1] == float(expected[-1] >= 0.5)
    play.wants(True)  # new words: what was said before them counts no more
    play.add(chunks[0])
    np.testing.assert_array_equal(play.next(), chunks[0][0])


def test_a_blind_policy_sees_one_picture_and_a_deaf_one_hears_nothing() -> None:
    asked: list[tuple[np.ndarray, list[str]]] = []

    def predict(images: np.ndarray, words: list[str]) -> Any:
        asked.append((images, words))
        return SimpleNamespace(actions=np.zeros((len(images), 2, 7)))

    policy = SimpleNamespace(predict=predict)
    pictures, words = list(np.random.default_rng(3).integers(0, 255, (5, 4, 4, 3)).astype(np.uint8)), list("abcde")
    blank = np.full((6, 6, 3), 9, np.uint8)
    assert PolicyActor(policy, 2, {}, batch_size=2, blank=blank).plan(pictures, words).shape == (5, 2, 7)
    assert [len(shown) for shown, _ in asked] == [2, 2, 1]
    assert all((shown == 9).all() and shown.shape[1:] == (6, 6, 3) for shown, _ in asked)
    asked.clear()
    PolicyActor(policy, 2, {}, silent=True).plan(pictures, words)
    assert asked[0][1] == ["."] * 5 and (asked[0][0] == np.stack(pictures)).all()


def test_shortcut_checks_run_on_a_checkpoint_and_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.cli import main
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    store = tmp_path / "store"
    assert main(["record", "tabletop", "--tasks", "move", "--episodes", "3", "--size", "32", "--out", str(store)]) == 0
    config = PolicyConfig(2, TABLETOP, (-0.02,) * 7, (0.02,) * 7, camera="front", width=16)
    VLAPolicy(tiny(image_size=56), config).save(tmp_path / "ck")
    bench = benchmark("tabletop-tasks@1")
    actor = make_actor(tmp_path / "ck", bench, data=store, blind="image")
    opened = EpisodeStore.open(store)
    every = opened.images("front", np.arange(len(opened))).astype(float).mean(0)
    assert isinstance(actor, PolicyActor) and actor.blank is not None
    assert np.abs(actor.blank - every).max() <= 0.5 and actor.labels["note"] == "tiny random model; without image"
    words = ["evaluate", str(tmp_path / "ck"), "--benchmark", "tabletop-tasks@1", "--tasks", "move", "--episodes", "2"]
    assert main([*words, "--blind", "language"]) == 0
    told = capsys.readouterr().out
    assert "without language" in told and "-blind-language" in told
    assert main([*words, "--blind", "image"]) == 2
    assert "--data STORE" in capsys.readouterr().err
    assert main(["evaluate", "zero", "--benchmark", "tabletop-tasks@1", "--blind", "language"]) == 2
    assert "zero looks at nothing" in capsys.readouterr().err
