"""Physics: conservation rules under random actions, hand-computed cases, independence of the batch."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.tabletop import scenes, tasks, world

FIELDS = [field.name for field in fields(world.State)]


def random_actions(rng: np.random.Generator, steps: int, n: int, bias: np.ndarray) -> np.ndarray:
    """(steps, n, 7): motions around `bias` (n, 3), some too large, fingers that stay closed for a while."""
    actions = rng.normal(0, 0.05, (steps, n, 7))
    actions[..., :3] += bias
    actions[..., 6] = np.repeat(rng.random((steps // 5 + 1, n)) < 0.4, 5, axis=0)[:steps]
    return actions


@settings(deadline=None, derandomize=True, max_examples=10)
@given(seed=st.integers(0, 10**6), task=st.sampled_from(tasks.TASKS))
def test_invariants_under_random_actions(seed: int, task: str) -> None:
    rng = np.random.default_rng(seed)
    n = 8
    state = world.stack([scenes.start(task, seed * n + i).state for i in range(n)])
    # Half of the hands are drawn towards an object, so that contacts and grasps happen.
    for actions in random_actions(rng, 60, n, np.zeros(3)):
        lure = state.objects[np.arange(n), 0] - state.gripper
        actions[: n // 2, :3] += 0.4 * lure[: n // 2]
        actions[-2:, :2] += 0.3 * (np.stack([state.knob, np.full(n, world.SWITCH_Y)], 1) - state.gripper[:, :2])[-2:]
        before, state = state, world.step(state, actions)
        assert (state.gripper >= world.WORKSPACE_LOW).all() and (state.gripper <= world.WORKSPACE_HIGH).all()
        present = state.kind >= 0
        bottom = (state.objects[..., 2] - world.rest_height(state.kind))[present]
        assert (bottom > -1e-9).all()
        rail = world.WORKSPACE_HIGH[:2] + world.RAIL + 1e-9
        assert (np.abs(state.objects[..., :2]) <= rail)[present].all()
        assert (state.objects[~present] == -1).all()
        # What is held keeps its place in the hand; everything else stands on the table or on a flat top.
        carried = (state.held >= 0) & (state.held == before.held)
        slot = np.maximum(state.held, 0)
        rows = np.arange(n)
        now = state.objects[rows, slot] - state.gripper
        then = before.objects[rows, slot] - before.gripper
        np.testing.assert_allclose(now[carried], then[carried], atol=1e-9)
        assert not (state.open & (state.held >= 0)).any()
        lying = present & (np.arange(world.SLOTS) != state.held[:, None])
        assert (state.on[~lying] == -1).all()
        for i, k in zip(*np.nonzero(lying), strict=True):
            half = world.rest_height(state.kind[i, k])
            if (base := state.on[i, k]) < 0:
                assert state.objects[i, k, 2] == half
                continue
            under = state.objects[i, base]
            assert lying[i, base] and world.FLAT_TOP[state.kind[i, base]] and (state.on[i] == base).sum() == 1
            assert np.hypot(*(state.objects[i, k, :2] - under[:2])) <= world.STACK_REACH + 1e-9
            top = under[2] + world.rest_height(state.kind[i, base])
            assert state.objects[i, k, 2] == pytest.approx(top + half, abs=1e-9)
        # Nothing inside another thing at its height: objects, the knob, the closed fingers.
        half = world.rest_height(state.kind)
        for i in range(world.SLOTS):
            for j in range(i):
                apart = np.hypot(*(state.objects[:, i, :2] - state.objects[:, j, :2]).T)
                beside = np.abs(state.objects[:, i, 2] - state.objects[:, j, 2]) < half[:, i] + half[:, j] - 1e-5
                assert (apart[lying[:, i] & lying[:, j] & beside] > 2 * world.FOOTPRINT - 0.005).all()
        spot = np.stack([state.knob, np.full(n, world.SWITCH_Y)], 1)
        assert (np.abs(state.knob - state.rail) <= world.KNOB_TRAVEL + 1e-9).all()
        apart = np.hypot(*np.moveaxis(state.objects[..., :2] - spot[:, None], -1, 0))
        low = state.objects[..., 2] - half < world.KNOB_HEIGHT
        assert (apart[lying & low] > world.KNOB_RADIUS + world.FOOTPRINT - 0.005).all()
        empty = ~state.open & (state.held < 0)
        apart = np.hypot(*np.moveaxis(state.objects[..., :2] - state.gripper[:, None, :2], -1, 0))
        level = state.gripper[:, None, 2] - world.TIP < state.objects[..., 2] + half - 1e-5
        assert (apart[lying & level & empty[:, None]] > world.CONTACT - 0.005).all()
        assert (world.contacts(state) >= (np.arange(world.SLOTS) == state.held[:, None])).all()


def test_random_actions_do_reach_the_interesting_states() -> None:
    """The invariants above would hold for nothing if no object were ever held, stacked, pushed or carried aloft."""
    rng = np.random.default_rng(0)
    n = 64
    state = first = world.stack([scenes.start("stack", i).state for i in range(n)])
    held, aloft, stacked = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
    for actions in random_actions(rng, 80, n, np.zeros(3)):
        target = np.where(state.held[:, None] >= 0, state.objects[:, 1] + [0, 0, 0.1], state.objects[:, 0])
        actions[:, :3] += 0.4 * (target - state.gripper)
        state = world.step(state, actions)
        held |= state.held >= 0
        aloft |= (state.objects[..., 2] > 0.07).any(1)
        stacked |= (state.on >= 0).any(1)
    moved = np.abs(state.objects - first.objects).max((1, 2)) > 0.05
    assert held.mean() > 0.3 and aloft.mean() > 0.1 and moved.mean() > 0.3 and stacked.mean() > 0.05


def lone_cube(**changes: object) -> world.State:
    """A cube in the middle, nothing else, the hand 12 cm to its left at pushing height, closed."""
    state = scenes.start("move", 0).state
    objects = np.full((1, world.SLOTS, 3), -1.0)
    objects[0, 0] = [0.0, 0.0, 0.043]
    base = replace(
        state, objects=objects, kind=np.array([[0, -1, -1, -1]]), gripper=np.array([[-0.12, 0.0, 0.04]]),
        yaw=np.zeros(1), open=np.zeros(1, bool), rail=np.zeros(1), knob=np.full(1, -world.KNOB_TRAVEL),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def act(state: world.State, *actions: list[float]) -> world.State:
    for action in actions:
        state = world.step(state, np.array([action], float))
    return state


def test_push_moves_the_object_ahead_of_the_fingers() -> None:
    state = act(lone_cube(), *[[0.05, 0, 0, 0, 0, 0, 0]] * 3)
    np.testing.assert_allclose(state.gripper[0], [0.03, 0, 0.04], atol=1e-12)
    np.testing.assert_allclose(state.objects[0, 0], [0.03 + world.CONTACT, 0, 0.043], atol=1e-6)


def test_an_open_hand_passes_and_a_high_one_too() -> None:
    for state in (lone_cube(open=np.ones(1, bool)), lone_cube(gripper=np.array([[-0.12, 0.0, 0.11]]))):
        after = act(state, *[[0.05, 0, 0, 0, 0, 0, float(state.open[0])]] * 3)
        np.testing.assert_array_equal(after.objects, state.objects)
        assert after.gripper[0, 0] == pytest.approx(0.03)


def test_a_closed_hand_rests_on_an_object() -> None:
    state = lone_cube(gripper=np.array([[0.0, 0.01, 0.2]]))
    after = act(state, *[[0, 0, -0.05, 0, 0, 0, 0]] * 5)
    assert after.gripper[0, 2] == pytest.approx(2 * 0.043 + world.TIP)
    np.testing.assert_array_equal(after.objects, state.objects)


def test_grasp_carry_release() -> None:
    state = lone_cube(gripper=np.array([[0.01, -0.02, 0.05]]), open=np.ones(1, bool))
    state = act(state, [0, 0, 0, 0, 0, 0, 0])
    assert state.held[0] == 0
    np.testing.assert_allclose(state.objects[0, 0], [0.01, -0.02, 0.043])  # centred between the fingers
    state = act(state, [0, 0, 0.06, 0, 0, 0.2, 0], [0.05, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(state.objects[0, 0], [0.06, -0.02, 0.103])
    assert state.object_yaw[0, 0] == pytest.approx(lone_cube().object_yaw[0, 0] + 0.2)
    state = act(state, [0, 0, -1, 0, 0, 0, 0], [0, 0, -1, 0, 0, 0, 0])  # the table stops the object
    np.testing.assert_allclose(state.objects[0, 0, 2], 0.043)
    state = act(state, [0, 0, 0.06, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1])
    assert state.held[0] == -1
    np.testing.assert_allclose(state.objects[0, 0], [0.06, -0.02, 0.043])


def test_closing_out_of_reach_holds_nothing() -> None:
    for place in ([world.GRASP_XY + 0.002, 0, 0.04], [0, 0, 0.043 + world.GRASP_Z + 0.002]):
        state = lone_cube(gripper=np.array([place]), open=np.ones(1, bool))
        assert act(state, [0, 0, 0, 0, 0, 0, 0]).held[0] == -1


def test_pushed_objects_push_others() -> None:
    state = lone_cube()
    objects, kind = state.objects.copy(), state.kind.copy()
    objects[0, 1], kind[0, 1] = [0.11, 0.0, 0.046], 1
    after = act(replace(state, objects=objects, kind=kind), *[[0.05, 0, 0, 0, 0, 0, 0]] * 3)
    assert after.objects[0, 1, 0] == pytest.approx(0.03 + world.CONTACT + 2 * world.FOOTPRINT, abs=1e-5)


def two(upper: int, place: list[float], **changes: object) -> world.State:
    """A cube in the middle and a second object at `place`, the hand far away and high."""
    state = lone_cube(gripper=np.array([[-0.2, -0.2, 0.3]]), open=np.ones(1, bool))
    objects, kind = state.objects.copy(), state.kind.copy()
    objects[0, 1], kind[0, 1] = place, upper
    return replace(state, objects=objects, kind=kind, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("offset", "stands"), [(0, True), (0.039, True), (0.041, False), (0.09, False), (0.11, False)])
def test_what_is_let_go_stands_on_a_flat_top_or_slides_off(offset: float, stands: bool) -> None:
    state = two(2, [offset, 0, 0.2], gripper=np.array([[offset, 0, 0.2]]), held=np.array([1]), open=np.zeros(1, bool))
    after = act(state, [0, 0, 0, 0, 0, 0, 1])
    if stands:
        assert after.on[0, 1] == 0 and after.objects[0, 1, 2] == pytest.approx(0.086 + 0.046)
        np.testing.assert_allclose(after.objects[0, 1, :2], [offset, 0])
    else:
        assert after.on[0, 1] == -1 and after.objects[0, 1, 2] == 0.046
        assert np.hypot(*(after.objects[0, 1, :2] - after.objects[0, 0, :2])) >= 2 * world.FOOTPRINT - 1e-5


def test_nothing_stands_on_a_ball() -> None:
    state = two(0, [0, 0, 0.2], gripper=np.array([[0, 0, 0.2]]), held=np.array([1]), open=np.zeros(1, bool))
    state = replace(state, kind=np.array([[1, 0, -1, -1]]), objects=state.objects + [[0, 0, 0.003]] * np.eye(4)[:, :1])
    after = act(state, [0, 0, 0, 0, 0, 0, 1])
    assert after.on[0, 1] == -1 and after.objects[0, 1, 2] == 0.043


def test_a_stack_moves_together_and_its_top_is_what_a_hand_takes() -> None:
    on = np.array([[-1, 0, -1, -1]])
    stacked = two(2, [0.01, 0, 0.132], on=on)
    low = replace(stacked, gripper=np.array([[-0.12, 0, 0.04]]), open=np.zeros(1, bool))
    pushed = act(low, *[[0.06, 0, 0, 0, 0, 0, 0]] * 2)
    np.testing.assert_allclose(pushed.objects[0, 1, :2] - pushed.objects[0, 0, :2], [0.01, 0], atol=1e-6)
    assert pushed.objects[0, 0, 0] > 0.06 and pushed.on[0, 1] == 0
    low = act(replace(stacked, gripper=np.array([[0, 0, 0.05]])), [0, 0, 0, 0, 0, 0, 0])
    assert low.held[0] == -1  # the lower one carries something
    high = act(replace(stacked, gripper=np.array([[0, 0, 0.13]])), [0, 0, 0, 0, 0, 0, 0], [0, 0, 0.06, 0, 0, 0, 0])
    assert high.held[0] == 1 and high.on[0, 1] == -1 and high.objects[0, 0, 2] == 0.043
    shoved = replace(stacked, gripper=np.array([[-0.12, 0, 0.13]]), open=np.zeros(1, bool))
    shoved = act(shoved, *[[0.06, 0, 0, 0, 0, 0, 0]] * 3)
    assert shoved.on[0, 1] == -1 and shoved.objects[0, 1, 2] == 0.046  # pushed off the lower one
    assert abs(shoved.objects[0, 0, 0]) < 0.01


def test_the_switch() -> None:
    hand = np.array([[-0.15, world.SWITCH_Y, 0.04]])
    state = lone_cube(gripper=hand)
    assert not world.switched_on(state)[0]
    after = act(state, *[[0.06, 0, 0, 0, 0, 0, 0]] * 2)
    assert world.switched_on(after)[0] and after.knob[0] == pytest.approx(-0.03 + world.FINGER + world.KNOB_RADIUS)
    end = act(after, *[[0.06, 0, 0, 0, 0, 0, 0]] * 3)  # the rail ends, and the hand with it
    assert end.knob[0] == pytest.approx(world.KNOB_TRAVEL)
    assert end.gripper[0, 0] == pytest.approx(world.KNOB_TRAVEL - world.FINGER - world.KNOB_RADIUS, abs=1e-5)
    over = act(replace(state, gripper=np.array([[-0.15, world.SWITCH_Y, 0.1]])), *[[0.06, 0, 0, 0, 0, 0, 0]] * 4)
    assert over.knob[0] == state.knob[0] and over.gripper[0, 0] == pytest.approx(0.09)


def test_limits_of_one_action() -> None:
    start = lone_cube(gripper=np.array([[0.0, 0.0, 0.2]]))
    long = act(start, [0.3, -0.4, 0.0, 0.5, 0.5, 2.0, 0])
    np.testing.assert_allclose(long.gripper[0], [0.036, -0.048, 0.2])  # 0.06 m, direction kept
    assert long.yaw[0] == pytest.approx(0.3)
    np.testing.assert_array_equal(world.proprioception(long)[0, 3:5], 0)  # roll and pitch are ignored
    short = act(start, [0.003, -0.004, 0.0, 0, 0, 0, 0.51])
    np.testing.assert_allclose(short.gripper[0], [0.003, -0.004, 0.2])
    assert short.open[0] and world.proprioception(short)[0, 6] == 1


def test_a_world_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(3)
    n, alone = 5, []
    actions = random_actions(rng, 40, n, np.zeros(3))
    starts = [scenes.start(tasks.TASKS[i % len(tasks.TASKS)], i).state for i in range(n)]
    for i in range(n):
        state = starts[i]
        for t in range(40):
            state = world.step(state, actions[t, [i]])
        alone.append(state)
    together = world.stack(starts)
    for t in range(40):
        together = world.step(together, actions[t])
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(together, name), getattr(world.stack(alone), name))


def crowd(n: int, seed: int) -> world.State:
    """Four objects side by side near the middle or in a corner of the table, a rail somewhere."""
    rng = np.random.default_rng(seed)
    state = world.stack([scenes.start("stack", seed * n + i).state for i in range(n)])
    kind = rng.integers(0, 3, (n, world.SLOTS))
    middle = rng.choice([[-0.19, -0.19], [0.0, 0.0], [0.19, 0.09]], n)[:, None]
    xy = middle + 0.055 * np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    objects = np.concatenate([xy, world.rest_height(kind)[..., None]], 2)
    rail = rng.uniform(-0.12, 0.12, n)
    return replace(state, kind=kind, objects=objects, rail=rail, knob=rail - world.KNOB_TRAVEL)


def test_crowds_in_corners_do_not_run_into_each_other() -> None:
    """Nothing deeper than a millimetre in anything, nothing passes through closed fingers or the knob, nothing hangs
    in the air; and a jammed world does not depend on its neighbours."""
    n = 84
    together = crowd(n, 1)
    parts = [together[np.arange(i, n, 7)] for i in range(7)]
    rng, deepest, rows = np.random.default_rng(2), 0.0, np.arange(n)
    for t, actions in enumerate(random_actions(rng, 36, n, np.zeros(3))):
        if t % 6 == 0:
            aim = rng.integers(0, world.SLOTS, n)  # plough through the crowd, close in it, again and again
        actions[:, :3] += together.objects[rows, aim] - together.gripper
        before, together = together, world.step(together, actions)
        parts = [world.step(part, actions[i::7]) for i, part in enumerate(parts)]
        xy, half = together.objects[..., :2], world.rest_height(together.kind)
        lying = np.arange(world.SLOTS) != together.held[:, None]
        floating = lying & (together.on < 0) & (np.abs(together.objects[..., 2] - half) > 1e-9)
        assert not floating.any()
        held = np.maximum(together.held, 0)
        full = together.held >= 0
        low = np.where(full, together.objects[rows, held, 2] - half[rows, held], together.gripper[:, 2] - world.TIP)
        wide = np.where(full, world.FOOTPRINT, world.FINGER)
        for k in range(world.SLOTS):
            depth = wide + world.FOOTPRINT - np.hypot(*(xy[:, k] - together.gripper[:, :2]).T)
            meets = ~together.open & lying[:, k] & (low < together.objects[:, k, 2] + half[:, k] - 1e-5)
            deepest = max(deepest, depth[meets].max(initial=0))
            for j in range(k):
                depth = 2 * world.FOOTPRINT - np.hypot(*(xy[:, k] - xy[:, j]).T)
                level = np.abs(together.objects[:, k, 2] - together.objects[:, j, 2]) < half[:, k] + half[:, j] - 1e-5
                deepest = max(deepest, depth[lying[:, k] & lying[:, j] & level].max(initial=0))
        spot = np.stack([together.knob, np.full(n, world.SWITCH_Y)], 1)
        depth = wide + world.KNOB_RADIUS - np.hypot(*(spot - together.gripper[:, :2]).T)
        deepest = max(deepest, depth[~together.open & (low < world.KNOB_HEIGHT - 1e-5)].max(initial=0))
        # Closed before and after, low before and after: an object stays on the side of the hand that it was on.
        then, now = (s.objects[..., :2] - s.gripper[:, None, :2] for s in (before, together))
        stays = ~before.open & ~together.open & ~full & (before.held < 0)
        level = lying & (before.on < 0) & (together.on < 0) & (before.gripper[:, 2:] < 0.09) & stays[:, None]
        level &= together.gripper[:, 2:] < 0.09
        assert ((then * now).sum(-1)[level] > 0).all()
    assert deepest < 1e-3
    for name in FIELDS:
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(getattr(part, name), getattr(together, name)[i::7])


def test_closing_over_the_knob_at_the_edge_puts_the_hand_beside_it() -> None:
    place = np.array([[-0.045, world.WORKSPACE_HIGH[1], 0.04]])  # the knob, at its rail's end, cannot go that way
    state = act(lone_cube(gripper=place, open=np.ones(1, bool)), [0, 0, 0, 0, 0, 0, 0])
    apart = np.hypot(state.gripper[0, 0] - state.knob[0], state.gripper[0, 1] - world.SWITCH_Y)
    assert apart > world.FINGER + world.KNOB_RADIUS - 1e-5 and state.gripper[0, 1] <= world.WORKSPACE_HIGH[1]


def _digest(threads: int) -> str:
    """Hash of states, labels and pictures of a few worlds, in a process with so many torch threads."""
    import hashlib

    import torch

    from vlm4vla_core.sims.tabletop.env import BatchedEnv

    torch.set_num_threads(threads)
    env = BatchedEnv(["chain", "put", "served-stack"], [3, 1 << 48, 5], ["A", "D", "R"], 48)
    found = hashlib.sha256()
    for _ in range(12):
        env.step(env.expert())
        for value in (env.state.gripper, env.state.objects, env.observe(), env.observe(camera="wrist")):
            found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def test_processes_and_threads_give_the_same_bytes() -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        one, two = pool.map(_digest, (1, 2), timeout=120)
    assert one == two == _digest(1)


def test_bad_actions_are_refused() -> None:
    state = lone_cube()
    with pytest.raises(InputError, match=r"action number 2 is nan"):
        act(state, [0, 0, np.nan, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"shape \(1, 6\), expected \(1, 7\)"):
        act(state, [0] * 6)


WORLD_2 = [  # of hand, objects, yaws, knob, held and on: sum, and sum weighted by position; demonstrations, then crowds
    [12.24758723, 1264.488134], [-195.8524931, -87666.80683], [4.914341991, -267.4899307],
    [-0.3165739911, -9.65564454], [-28, -762], [-277, -39277],
    [1.611400478, 64.58721836], [7.231397932, 1337.144099], [4.586544091, 252.833464],
    [-2.214035996, -53.88477984], [-16, -337], [-168, -14196],
]  # fmt: skip


def test_the_world_is_still_that_of_its_version() -> None:
    """Where everything stands after noisy demonstrations and in ploughed crowds, as first found with version 2.

    A change of these numbers makes recorded stores and published results stale, and needs a new `world.VERSION`.
    """
    from vlm4vla_core.sims.tabletop.expert import expert

    rng, n = np.random.default_rng(5), 70
    starts = [scenes.start(tasks.TASKS[i % 7], i) for i in range(n)]
    state = world.stack([start.state for start in starts])
    goal = tasks.goals(state, [start.asks[0] for start in starts])
    for _ in range(40):
        state = world.step(state, expert(state, goal) + rng.normal(0, 0.02, (n, 7)))
    ploughed = crowd(42, 3)
    for actions in random_actions(rng, 24, 42, np.zeros(3)):
        actions[:, :3] += ploughed.objects[:, 1] - ploughed.gripper
        ploughed = world.step(ploughed, actions)
    found = [
        [value.sum(), (value * np.arange(1, 1 + value.size).reshape(value.shape)).sum()]
        for each in (state, ploughed)
        for value in (each.gripper, each.objects, each.object_yaw, each.knob, each.held, each.on)
    ]
    assert world.VERSION == 2
    np.testing.assert_allclose(found, WORLD_2, rtol=1e-5)
