"""Questions about a tabletop scene as a camera sees it, with known answers: what a general VLM is asked.

`GENERAL` maps a kind to a pure function of a `Sight` (what lies where, and the camera). Left, behind and the grid are
the picture's own, so they turn with the camera. Options stand in the question, and the forms of a kind share their
answers, so that who reads without looking does no better than the commonest answer.

Trap: answers come from centres. An object half hidden by another one is asked about like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.looks import LOOKS, Camera
from vlm4vla_core.sims.tabletop.tasks import object_names, plate_names

if TYPE_CHECKING:
    from vlm4vla_core.sims.tabletop.world import State

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
COLUMNS, ROWS = 8, 6  # of the grid laid over the picture
BESIDE = 0.06  # picture widths; what is nearer is not said to be left of the other
BEHIND = 0.05  # m along the camera's axis
NEARER = 0.03  # m by which the closest object beats the next
Groups = list[list[tuple[str, str]]]  # (question, answer); one group is drawn first, then one of it


@dataclass(frozen=True)
class Sight:
    """What is on the table, and who looks. names: "red cube"…, at places (k, 3) m; plates: "blue plate"…, at
    plate_places (p, 2) m."""

    names: tuple[str, ...]
    places: np.ndarray
    plates: tuple[str, ...]
    plate_places: np.ndarray
    camera: Camera

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture coordinates (k, 2), right and down in fractions, and depth (k,) m of the objects."""
        return self.camera.project(self.places)


def sight(state: State, domain: str, row: int = 0) -> Sight:
    """World `row` of a batch, seen by its domain's front camera."""
    shown = state.plate_colour[row] >= 0
    return Sight(
        tuple(object_names(state, row)),
        state.objects[row][state.kind[row] >= 0],
        tuple(name for name in plate_names(state, row) if name),
        state.plate[row][shown],
        LOOKS[domain].camera,
    )


def ask(view: Sight, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of this kind and its answer, drawn with `rng`; None when the scene allows none."""
    groups = [group for group in GENERAL[kind](view) if group]
    if not groups:
        return None
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _colour(view: Sight) -> Groups:
    split = [name.split() for name in view.names]
    shapes = [shape for _, shape in split]
    form = "What color is the {}: " + _listed(world.COLOURS) + "?"
    return [[(form.format(shape), colour) for colour, shape in split if shapes.count(shape) == 1]]


def _shape(view: Sight) -> Groups:
    form = "What shape is the {} object: " + _listed(world.KINDS) + "?"
    return [[(form.format(colour), shape) for colour, shape in map(str.split, view.names)]]


def _count(view: Sight) -> Groups:
    shapes = [name.split()[1] for name in view.names]
    form = "How many {}s are there: " + _listed(NUMBERS[: world.SLOTS + 1]) + "?"
    return [[(form.format(shape), NUMBERS[shapes.count(shape)]) for shape in world.KINDS]]


def _pairs(view: Sight, value: np.ndarray, margin: float, form: str) -> Groups:
    """Yes-or-no questions on all ordered pairs whose values differ by more than `margin`; yes for the lower one."""
    names = view.names
    clear = [(i, j) for i in range(len(names)) for j in range(len(names)) if abs(value[i] - value[j]) > margin]
    return [[(form.format(names[i], names[j]), "yes" if value[i] < value[j] else "no") for i, j in clear]]


def _left(view: Sight) -> Groups:
    return _pairs(view, view.seen()[0][:, 0], BESIDE, "Is the {} left of the {}, yes or no?")


def _behind(view: Sight) -> Groups:
    return _pairs(view, -view.seen()[1], BEHIND, "Is the {} behind the {}, yes or no?")


def _closest(view: Sight) -> Groups:
    made = []
    for i, name in enumerate(view.names):
        apart = world.length(view.places - view.places[i])
        order = [j for j in np.argsort(apart, kind="stable") if j != i]
        if len(order) > 1 and apart[order[1]] - apart[order[0]] > NEARER:
            made.append((f"Which object is closest to the {name}?", view.names[order[0]]))
    return [made]


def _where(view: Sight) -> Groups:
    flat = np.concatenate([view.plate_places, np.zeros((len(view.plates), 1))], 1)
    groups = []
    for names, places in ((view.names, view.places), (view.plates, flat)):
        cells = np.floor(view.camera.project(places)[0] * (COLUMNS, ROWS)).astype(int)  # (k, 2)
        inside = np.all((cells >= 0) & (cells < (COLUMNS, ROWS)), axis=1).tolist()
        form = f"Where is the {{}}, in column one to {NUMBERS[COLUMNS]} and row one to {NUMBERS[ROWS]}?"
        groups.append(
            [
                (form.format(name), f"column {NUMBERS[x + 1]} row {NUMBERS[y + 1]}")
                for name, (x, y), whole in zip(names, cells, inside, strict=True)
                if whole
            ]
        )
    return groups


def _caption(view: Sight) -> Groups:
    across = view.seen()[0][:, 0]
    order = np.argsort(across, kind="stable")
    if (np.diff(across[order]) < BESIDE / 2).any():
        return []
    return [[("List the objects from left to right.", ", ".join(view.names[i] for i in order))]]


GENERAL: dict[str, Callable[[Sight], Groups]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "left": _left,
    "behind": _behind,
    "closest": _closest,
    "where": _where,
    "caption": _caption,
}
