"""Questions about scenes: every answer worked out anew from the world's state, by code that shares nothing."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from vlm4vla_core.families import families, family
from vlm4vla_core.sims.benchmarks import EVALUATION_BIT, is_evaluation_seed, recording_seed
from vlm4vla_core.sims.tabletop import render, scenes, tasks, world
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.tiny import tiny_tokenizer
from vlm4vla_core.vqa.general import GENERAL, ask, sight

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def look(domain: str, point: np.ndarray) -> tuple[float, float, float]:
    """Picture x, y (fractions) and depth of a point, by plain trigonometry: turn and tilt of the camera."""
    camera = LOOKS[domain].camera
    (ax, ay, az), (bx, by, bz) = camera.position, camera.target
    turn, tilt = math.atan2(bx - ax, by - ay), math.atan2(az - bz, math.hypot(bx - ax, by - ay))
    dx, dy, dz = point[0] - ax, point[1] - ay, point[2] - az
    right = dx * math.cos(turn) - dy * math.sin(turn)
    ahead = dx * math.sin(turn) + dy * math.cos(turn)
    depth = ahead * math.cos(tilt) - dz * math.sin(tilt)
    up = ahead * math.sin(tilt) + dz * math.cos(tilt)
    return 0.5 + camera.focal * right / depth, 0.5 - camera.focal * up / depth, depth


def truth(state: world.State, domain: str, question: str) -> str:
    """The answer to a question, read with regular expressions; fails on what should not have been asked."""
    things = {}
    for slot in range(4):
        if state.kind[0, slot] >= 0:
            name = f"{world.COLOURS[state.colour[0, slot]]} {world.KINDS[state.kind[0, slot]]}"
            assert name not in things
            things[name] = state.objects[0, slot]
    for number in range(2):
        things[f"{world.COLOURS[state.plate_colour[0, number]]} plate"] = np.array([*state.plate[0, number], 0.0])
    objects = [name for name in things if not name.endswith("plate")]
    if found := re.match(r"What color is the (\w+): ", question):
        (name,) = [name for name in objects if name.endswith(found[1])]
        return name.split()[0]
    if found := re.match(r"What shape is the (\w+) object: ", question):
        (name,) = [name for name in objects if name.startswith(found[1])]
        return name.split()[1]
    if found := re.match(r"How many (\w+)s are there: ", question):
        return WORDS[sum(name.endswith(found[1]) for name in objects)]
    if found := re.match(r"Is the (.+) (left of|behind) the (.+), yes or no", question):
        index = {"left of": 0, "behind": 2}[found[2]]
        first, second = (look(domain, things[found[i]])[index] for i in (1, 3))
        assert abs(first - second) > 0.04
        return "yes" if (first < second) == (index == 0) else "no"
    if found := re.match(r"Which object is closest to the (.+)\?", question):
        others = sorted((math.dist(things[found[1]], things[name]), name) for name in objects if name != found[1])
        assert others[1][0] - others[0][0] > 0.02
        return others[0][1]
    if found := re.match(r"Where is the (.+), in column one to eight and row one to six", question):
        x, y, _ = look(domain, things[found[1]])
        return f"column {WORDS[1 + int(x // 0.125)]} row {WORDS[1 + int(y // (1 / 6))]}"
    assert question == "List the objects from left to right."
    return ", ".join(sorted(objects, key=lambda name: look(domain, things[name])[0]))


def asked(kind: str, number: int, domains: str = "UVW") -> list[tuple[world.State, str, str, str]]:
    made = []
    for seed in range(number):
        state, domain = scenes.scene(seed), domains[seed % len(domains)]
        if found := ask(sight(state, domain), kind, np.random.default_rng(seed)):
            made.append((state, domain, *found))
    return made


@pytest.mark.parametrize("kind", GENERAL)
def test_every_answer_follows_from_the_state(kind: str):
    """Majority levels, measured on these scenes, stand in the documentation."""
    found = asked(kind, 300) + asked(kind, 90, "ABCDRST")
    assert len(found) > 200
    for state, domain, question, answer in found:
        assert answer == truth(state, domain, question), question
    commonest = Counter(answer for *_, answer in found).most_common(1)[0][1] / len(found)
    assert commonest < {"left": 0.6, "behind": 0.6, "count": 0.55, "shape": 0.5}.get(kind, 0.35)


def test_reading_without_looking_is_no_better_than_the_commonest_answer():
    """Among questions with the same words, the commonest answer is right about as often as over all of a kind."""
    for kind in ("colour", "shape", "count", "left", "behind"):
        forms = defaultdict(Counter)
        for *_, question, answer in asked(kind, 900):
            forms["all"][answer] += 1
            forms[question.split(":")[0] if kind in ("colour", "shape", "count") else kind][answer] += 1
        overall = max(forms["all"].values()) / forms["all"].total()
        blind = sum(max(form.values()) for name, form in forms.items() if name != "all") / forms["all"].total()
        assert blind < overall + 0.06, kind


def test_left_and_behind_turn_with_the_camera():
    """Of some pair, the camera at the right (U) and the one at the left (V) say different things."""
    told = defaultdict(set)
    for seed in range(60):
        state = scenes.scene(seed)
        for domain, kind in itertools.product("UV", ("left", "behind")):
            for question, answer in itertools.chain(*GENERAL[kind](sight(state, domain))):
                told[seed, question].add(answer)
    assert any(len(answers) == 2 for answers in told.values())


def test_a_scene_is_a_function_of_its_seed_and_shows_everything_but_the_hand():
    counts = Counter()
    for seed in range(60):
        state, again = scenes.scene(seed), scenes.scene(seed)
        assert all(np.array_equal(getattr(state, name), getattr(again, name)) for name in ("objects", "kind", "knob"))
        counts[int((state.kind[0] >= 0).sum())] += 1
        for domain in "UVW":
            for point in state.objects[0][state.kind[0] >= 0]:
                x, y, depth = look(domain, point)
                assert 0.02 < x < 0.98 and 0.02 < y < 0.98 and depth > 0.5
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 10
    states = world.stack([scenes.scene(seed) for seed in range(24)])
    picture = render.render(states, ["U", "V", "W"] * 8, 64, geometry=True, hand=False)
    assert not (picture.segmentation == render.GRIPPER).any()
    for row in range(24):  # each object has pixels of its own
        for slot in np.flatnonzero(states.kind[row] >= 0):
            assert (picture.segmentation[row] == render.OBJECTS + slot).sum() > 5


def test_seeds_of_recorded_scenes_are_no_evaluation_seeds():
    from vlm4vla_core.vqa.benchmark import item

    recorded = {recording_seed("scene", seed, index) for seed in range(3) for index in range(100)}
    asked_about = {item(kind, number).seed for kind in GENERAL for number in range(10)}
    assert not any(map(is_evaluation_seed, recorded)) and all(map(is_evaluation_seed, asked_about))
    assert not recorded & asked_about and len(asked_about) == 10 * len(GENERAL)
    assert all(seed & EVALUATION_BIT for seed in asked_about)


def test_every_word_that_is_asked_or_told_is_one_token_of_the_tiny_tokenizer():
    texts = {text for kind in GENERAL for *_, question, answer in asked(kind, 30) for text in (question, answer)}
    for entry in tasks.FAMILIES.values():
        for template in entry.templates + entry.held_out:
            texts |= {template.format(o="red cube", p="blue plate", d=words) for d in entry.directions or ("",)
                      for words in (*tasks.PHRASES.get(d, ("",)), *tasks.HELD_OUT_PHRASES.get(d, ("",)))}  # fmt: skip
    for long in scenes.LONG.values():
        names = dict.fromkeys("abcpq", "cyan cylinder")
        texts |= {template.format(**names) for template in long.templates + long.held_out}
    for name in families()[::4]:
        tokenizer = tiny_tokenizer(family(name))
        for text in texts:
            words = re.findall(r"\w+|[^\w\s]", text)
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(words), text
