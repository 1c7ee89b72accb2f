"""Tasks, expert and protocols: initial states, success rules, seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims import PROTOCOLS, benchmark
from vlm4vla_core.sims.benchmarks import is_evaluation_seed, recording_seed
from vlm4vla_core.sims.tabletop import scenes, tasks, world
from vlm4vla_core.sims.tabletop.env import begin, step_limit
from vlm4vla_core.sims.tabletop.expert import expert


def batch(task: str, seeds: range) -> tuple[world.State, tasks.Goal, list[str]]:
    starts = [scenes.start(task, seed) for seed in seeds]
    state = world.stack([s.state for s in starts])
    return state, tasks.goals(state, [s.asks[0] for s in starts]), [s.instruction for s in starts]


def solve(state: world.State, goal: tasks.Goal, limit: int) -> np.ndarray:
    """(n,) step of the first success, 0 where there was none; also checks the expert's actions."""
    first = np.zeros(len(state), int)
    for t in range(limit):
        actions = expert(state, goal)
        assert (np.linalg.norm(actions[:, :3], axis=1) <= world.MAX_STEP + 1e-12).all()
        assert (np.abs(actions[:, 5]) <= world.MAX_TURN).all() and set(np.unique(actions[:, 6])) <= {0.0, 1.0}
        state = world.step(state, actions)
        first[(first == 0) & tasks.success(state, goal)] = t + 1
    return first


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_expert_solves_every_start(task: str) -> None:
    state, goal, _ = batch(task, range(1000, 1060))
    assert not tasks.success(state, goal).any()
    first = solve(state, goal, tasks.FAMILIES[task].step_limit)
    assert (first > 0).all()
    assert first.max() <= 0.8 * tasks.FAMILIES[task].step_limit  # the limit leaves room for a policy slower than this


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_expert_recovers_from_any_state(task: str) -> None:
    """After 25 random actions, with things pushed about, dropped, held and jammed at the rail."""
    state, goal, _ = batch(task, range(60))
    rng = np.random.default_rng(1)
    for _ in range(25):
        actions = rng.normal(0, 0.05, (60, 7))
        actions[:, :3] += 0.3 * (state.objects[:, 0] - state.gripper)
        actions[:, 6] = rng.random(60) < 0.3
        state = world.step(state, actions)
    # A base that was pushed into a corner, beyond the hand's reach, cannot be stacked on.
    assert (solve(state, goal, 2 * tasks.FAMILIES[task].step_limit) > 0).mean() >= (0.95 if task == "stack" else 1)


def test_labels_do_not_depend_on_history_or_batch() -> None:
    state, goal, _ = batch("push", range(6))
    whole = expert(state, goal)
    for i in range(6):
        np.testing.assert_array_equal(expert(state[[i]], goal[[i]])[0], whole[i])


def test_starts_cover_the_workspace_and_all_targets() -> None:
    positions, words = [], Counter()
    for task in tasks.TASKS:
        state, goal, instructions = batch(task, range(200))
        positions.append(state.gripper)
        assert (state.gripper >= world.WORKSPACE_LOW).all() and (state.gripper <= world.WORKSPACE_HIGH).all()
        words.update(word for text in instructions for word in text.split())
        if task in ("move", "push", "switch"):
            counts = Counter(map(tuple, goal.direction.astype(int)))
            assert len(counts) == len(tasks.FAMILIES[task].directions) and min(counts.values()) > 20
        present = state.kind >= 0
        assert set(present.sum(1)) == {2, 3, 4} and (state.plate_colour >= 0).all()
        for row in range(200):
            names = tasks.object_names(state, row)
            assert len({name.split()[0] for name in names}) == len(names)  # colours differ, so names are unique
    spread = np.concatenate(positions)
    for axis in range(3):
        low = 0.08 if axis == 2 else world.WORKSPACE_LOW[axis]  # hands start clear of the objects' sides
        share = np.histogram(spread[:, axis], bins=4, range=(low, world.WORKSPACE_HIGH[axis]))[0]
        assert share.min() > 0.12 * len(spread)
    assert set(words) >= {*world.COLOURS, *world.KINDS, "left", "right", "forward", "back", "up", "plate", "light"}


def test_instructions_name_the_target() -> None:
    for task in ("touch", "push", "pick", "put", "stack"):
        state, goal, instructions = batch(task, range(50))
        for row, text in enumerate(instructions):
            slot = goal.slot[row]
            name = f"{world.COLOURS[state.colour[row, slot]]} {world.KINDS[state.kind[row, slot]]}"
            assert name in text
            if task == "put":
                assert f"{world.COLOURS[state.plate_colour[row, goal.other[row]]]} plate" in text
            if task == "stack":
                assert tasks.describe_object(state, row, goal.other[row]) in text
            if task == "push":
                phrase = {(-1, 0): "left", (1, 0): "right", (0, 1): ("forward", "away"), (0, -1): ("back", "towards")}
                expected = phrase[tuple(goal.direction[row, :2].astype(int))]
                assert any(word in text for word in ([expected] if isinstance(expected, str) else expected))


def test_success_rules_by_hand() -> None:
    state, goal, _ = batch("move", range(1))
    goal = replace(goal, direction=np.array([[-1.0, 0, 0]]), gripper_start=np.array([[0.1, 0.0, 0.1]]))
    for place, expected in (
        ([-0.021, 0.0, 0.1], True), ([-0.019, 0.0, 0.1], False), ([0.221, 0.0, 0.1], False),
        ([-0.1, 0.0, 0.179], True), ([-0.1, 0.06, 0.16], False),
    ):  # fmt: skip
        assert tasks.success(replace(state, gripper=np.array([place])), goal)[0] == expected, place
    state, goal, _ = batch("push", range(1))
    slot = int(goal.slot[0])
    for along, across, held, expected in (
        (0.101, 0.0, -1, True), (0.099, 0.0, -1, False), (0.2, 0.069, -1, True), (0.2, 0.071, -1, False),
        (0.2, 0.0, slot, False), (-0.2, 0.0, -1, False),
    ):  # fmt: skip
        direction = goal.direction[0]
        objects = goal.objects_start.copy()
        objects[0, slot] += along * direction + across * np.array([direction[1], direction[0], 0])
        done = tasks.success(replace(state, objects=objects, held=np.array([held])), goal)[0]
        assert done == expected, (along, across, held)
    state, goal, _ = batch("pick", range(1))
    slot = int(goal.slot[0])
    for height, held, expected in ((0.101, slot, True), (0.099, slot, False), (0.2, -1, False)):
        objects = goal.objects_start + np.array([0, 0, height]) * (np.arange(world.SLOTS) == slot)[:, None]
        assert tasks.success(replace(state, objects=objects, held=np.array([held])), goal)[0] == expected
    state, goal, _ = batch("touch", range(1))
    target = state.objects[:, int(goal.slot[0])]
    for offset, expected in (([0.034, 0.034, 0.034], True), ([0.036, 0.036, 0.036], False)):
        assert tasks.success(replace(state, gripper=target + offset), goal)[0] == expected


def test_success_rules_of_placing_by_hand() -> None:
    state, goal, _ = batch("put", range(1))
    slot, plate = int(goal.slot[0]), state.plate[0, int(goal.other[0])]
    rest = world.rest_height(state.kind[0, slot])
    for offset, held, expected in ((0.064, -1, True), (0.066, -1, False), (0.0, slot, False)):
        objects = state.objects.copy()
        objects[0, slot] = [plate[0] + offset, plate[1], rest]
        assert tasks.success(replace(state, objects=objects, held=np.array([held])), goal)[0] == expected
    on = state.on.copy()
    on[0, slot] = (slot + 1) % 2  # over the plate, but on another object
    objects[0, slot, :2] = plate
    assert not tasks.success(replace(state, objects=objects, on=on), goal)[0]
    state, goal, _ = batch("stack", range(1))
    on = state.on.copy()
    on[0, goal.slot[0]] = goal.other[0]
    assert tasks.success(replace(state, on=on), goal)[0] and not tasks.success(state, goal)[0]
    state, goal, _ = batch("switch", range(1))
    sign = goal.direction[0, 0]
    for offset, expected in ((0.031, True), (0.029, False), (-0.05, False)):
        assert tasks.success(replace(state, knob=state.rail + sign * offset), goal)[0] == expected


# --- chains and long tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tabletop-abc-d@1", "tabletop-long@1"])
def test_the_expert_solves_chains_and_long_tasks(protocol: str) -> None:
    bench = benchmark(protocol)
    cells = [(task, i) for i in range(60 // len(bench.tasks)) for task in bench.tasks]
    world_ = bench.env([task for task, _ in cells], [bench.env_seed(task, i) for task, i in cells])
    asked = [set() for _ in cells]
    while world_.running.any():
        for row, words in enumerate(world_.instructions):
            asked[row].add(words)
        world_.step(world_.expert())
    outcomes = [world_.outcome(row) for row in range(len(cells))]
    assert all(outcome["success"] and outcome["partial"] == 1 for outcome in outcomes)
    if protocol == "tabletop-abc-d@1":
        assert {outcome["chain"] for outcome in outcomes} == {5}
        assert sum(len(words) for words in asked) > 4.5 * len(cells)  # an instruction may come twice
    else:
        assert {outcome["chain"] for outcome in outcomes} == {None}


def test_a_chain_counts_its_parts_and_ends_at_the_first_that_is_late() -> None:
    bench = benchmark("tabletop-abc@1")
    chains = bench.env(["chain"] * 8, [bench.env_seed("chain", i) for i in range(8)])
    stop = np.arange(8) % 4  # after so many parts a world stands still
    first_words, at = list(chains.instructions), np.zeros((8, 6), int)
    while chains.running.any():
        actions = np.where((chains.done < stop)[:, None], chains.expert(), 0.0)
        before = chains.done.copy()
        chains.step(actions)
        for row in np.flatnonzero(chains.done > before):
            assert chains.renewed[row] and chains.instructions[row] != ""
            at[row, chains.done[row]] = chains.steps[row]
    for row in range(8):
        outcome = chains.outcome(row)
        assert outcome["chain"] >= stop[row]  # standing still may solve a part only by accident
        assert outcome["partial"] == outcome["chain"] / 5 and outcome["success"] == (outcome["chain"] == 5)
        limit = tasks.FAMILIES[tasks.TASKS[chains.goals[0].family[row]]].step_limit
        assert outcome["steps"] == at[row, outcome["chain"]] + limit
        if outcome["chain"] == 0:
            assert chains.instructions[row] == first_words[row]


def test_the_next_part_of_a_chain_depends_on_state_and_seed_only() -> None:
    state = scenes.chain_start(5)
    assert scenes.chain_ask(state, 5, 1) == scenes.chain_ask(state, 5, 1)
    drawn = {scenes.chain_ask(state, seed, 1)[0] for seed in range(60)}
    possible = {family for family in scenes.CHAIN for ask in tasks.all_asks(family, 4, 2) if tasks.fits(state, ask)}
    assert len(drawn) > 15 and {ask.family for ask in drawn} == possible
    assert all(tasks.fits(state, ask) for ask in drawn)


def test_partial_success_of_a_long_task() -> None:
    bench = benchmark("tabletop-long@1")
    long = bench.env(["plate-and-light"] * 2, [bench.env_seed("plate-and-light", i) for i in range(2)])
    first = long.goals[0]
    while long.running.any():
        actions = long.expert()
        actions[tasks.success(long.state, first)] = 0.0  # the plate is served, the light left off
        actions[tasks.success(long.state, first), 6] = 1.0
        long.step(actions)
    assert [long.outcome(row)["partial"] for row in range(2)] == [0.5, 0.5]
    assert not long.outcome(0)["success"] and long.outcome(0)["steps"] == step_limit("plate-and-light")


@pytest.mark.parametrize("task", [*tasks.TASKS, "chain", *scenes.LONG])
def test_held_out_words_are_in_no_demonstration(task: str) -> None:
    starts, others = ([begin(task, seed, held_out=held) for seed in range(60)] for held in (False, True))
    assert not {start.instruction for start in starts} & {start.instruction for start in others}
    for a, b in zip(starts, others, strict=True):  # the scene is the same, the words are not
        assert a.asks == b.asks and (a.state.objects == b.state.objects).all()
    # With the names of things struck out, every template and no other shows.
    shapes, unseen = ({_struck(start) for start in group} for group in (starts, others))
    assert len(shapes) > 1 and len(unseen) > 1 and not shapes & unseen


def _struck(start: scenes.Start) -> str:
    """An instruction without the names of things."""
    names = [*tasks.object_names(start.state, 0), *tasks.plate_names(start.state, 0)]
    return re.sub("|".join(names), "…", start.instruction)


def test_words_of_long_tasks_name_what_is_asked_and_nothing_else() -> None:
    """Read back with regular expressions: every sentence says each of its asks, whatever the wording."""
    lay, light = r"the (\w+ \w+)", r"(?:turn|switch) (?:the (?:light|lamp) )?(on|off)"
    for task, entry in scenes.LONG.items():
        shown = set()
        for seed, held in ((seed, held) for seed in range(40) for held in (False, True)):
            start = scenes.long_start(task, seed, held_out=held)
            objects, plates = tasks.object_names(start.state, 0), tasks.plate_names(start.state, 0)
            text, meant = start.instruction, set()
            for ask in entry.asks:
                if ask.family == "switch":
                    meant.add((ask.direction,))
                else:
                    other = {"put": plates, "stack": objects}.get(ask.family, [""] * 3)[ask.other]
                    meant.add((objects[ask.slot], other) if other else (objects[ask.slot],))
            said = {(found,) for found in re.findall(light, text)}
            rest = re.sub(light + r"(?: the (?:light|lamp))?", "", text).replace("pick up", "pick")
            if found := re.fullmatch(rf"stack {lay} on {lay} on {lay}", rest):
                said |= {(found[1], found[2]), (found[2], found[3])}
            else:
                for clause in filter(None, (part.strip() for part in rest.split(" and "))):
                    things = re.findall(lay, clause)
                    if re.search(r"\b(it)$", clause):  # "on it": what the clause before put down
                        things.append(objects[0])
                    said.add(tuple(things))
            assert said == meant, text
            shown.add(_struck(start))
        assert len(shown) == len(entry.templates) + len(entry.held_out), task


# --- protocols ----------------------------------------------------------------------------------------------------


def test_episodes_depend_on_task_seed_and_actions_only() -> None:
    bench = benchmark("tabletop-tasks@1")
    names = ["move", "pick", "touch", "push", "move"]
    seeds = [bench.env_seed(task, episode) for episode, task in enumerate(names)]
    rng = np.random.default_rng(0)
    actions = rng.normal(0, 0.05, (6, 5, 7))
    together = bench.env(names, seeds)
    alone = [bench.env([task], [seed]) for task, seed in zip(names, seeds, strict=True)]
    for t in range(6):
        together.step(actions[t])
        for i, env in enumerate(alone):
            env.step(actions[t, [i]])
    pictures = together.observe()
    assert pictures.shape == (5, 112, 112, 3) and pictures.dtype == np.uint8
    for i, env in enumerate(alone):
        assert together.instructions[i] == env.instructions[0]
        assert together.success()[i] == env.success()[0]
        np.testing.assert_array_equal(together.expert()[i], env.expert()[0])
        np.testing.assert_array_equal(pictures[i], env.observe()[0])
    np.testing.assert_array_equal(together.observe([3, 1]), pictures[[3, 1]])


def test_seeds_of_evaluation_and_recording_are_disjoint_and_distinct() -> None:
    bench = benchmark("tabletop-tasks-abc@1")
    evaluation = [bench.env_seed(task, episode) for task in bench.tasks for episode in range(500)]
    recording = [recording_seed(task, seed, i) for task in bench.tasks for seed in range(3) for i in range(200)]
    assert len(set(evaluation)) == 3500 and len(set(recording)) == 4200
    assert all(map(is_evaluation_seed, evaluation)) and not any(map(is_evaluation_seed, recording))
    assert all(float(seed) == seed for seed in evaluation)
    assert bench.env_seed("move", 0) == benchmark("tabletop-tasks@1").env_seed("move", 0)
    # Frozen: published numbers refer to exactly these scenes.
    assert bench.env_seed("move", 0) == 298297453445951 and recording_seed("pick", 0, 0) == 32322369184161


def test_training_test_and_question_looks_are_disjoint() -> None:
    for name in ("tabletop-abc-d@1", "tabletop-shift@1", "tabletop-tasks@1"):
        assert benchmark(name).kept_for_test == set(benchmark(name).domains)
    for name in ("tabletop-abc@1", "tabletop-long@1", "tabletop-tasks-abc@1", "tabletop-words@1",
                 "tabletop-long-words@1"):  # fmt: skip
        assert not benchmark(name).kept_for_test
    seen = {domain for bench in PROTOCOLS.values() for domain in (*bench.domains, *bench.train_domains)}
    assert seen == set("ABCDRST") and not seen & set("UVW")


@pytest.mark.slow
@pytest.mark.parametrize("task", [*tasks.TASKS, "chain", *scenes.LONG])
def test_the_expert_never_fails_in_500_episodes(task: str) -> None:
    name = {"chain": "tabletop-abc-d@1"} | dict.fromkeys(scenes.LONG, "tabletop-long@1")
    bench = benchmark(name.get(task, "tabletop-tasks@1"))
    world_ = bench.env([task] * 500, [bench.env_seed(task, i) for i in range(500)])
    while world_.running.any():
        world_.step(world_.expert())
    failed = [row for row in range(500) if not world_.outcome(row)["success"]]
    assert not failed


def test_domains_of_the_protocols() -> None:
    unseen, seen = benchmark("tabletop-tasks@1"), benchmark("tabletop-tasks-abc@1")
    assert not set(unseen.domains) & set(unseen.train_domains)
    seeds = [seen.env_seed("move", episode) for episode in range(60)]
    assert set(unseen.env(["move"] * 60, seeds).domains) == {"D"}
    counts = Counter(seen.env(["move"] * 60, seeds).domains)
    assert set(counts) == {"A", "B", "C"} and min(counts.values()) > 8


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_description_is_plain_json_and_complete(protocol: str) -> None:
    bench = benchmark(protocol)
    told = bench.describe()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["protocol"] == protocol and set(told["tasks"]) == set(bench.tasks) == set(bench.step_limits)
    assert told["convention"] == TABLETOP.to_dict() and len(bench.action_limit) == TABLETOP.size
    assert told["success_rule"] in ("any_step", "last_step") and set(told["cameras"]) == set(bench.domains)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown benchmark 'tabletop-abc-d@9'.*did you mean 'tabletop-abc-d@1'"):
        benchmark("tabletop-abc-d@9")
    with pytest.raises(InputError, match=r"no task 'pikc'.*did you mean 'pick'"):
        benchmark("tabletop-tasks@1").env(["pikc"], [1])
    with pytest.raises(InputError, match="no task 'fly'"):
        scenes.start("fly", 0)
