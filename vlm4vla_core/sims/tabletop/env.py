"""Episodes of the tabletop world, many at once: what is asked, how far it has come, and what the camera shows.

A single or long task is done when all of its asks hold. A chain asks five things one after the other; each has its
family's step limit, and the first that is not done in time ends the chain (as in CALVIN).

Trap: an episode's outcome depends only on its task, its seed and its actions, never on the batch. `renewed` says in
which worlds the words have just changed: whoever plays out a chunk of actions has to look again there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.sims.tabletop import scenes, world
from vlm4vla_core.sims.tabletop.expert import expert
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.sims.tabletop.rules import Ask, Goal
from vlm4vla_core.sims.tabletop.sensor import degrade
from vlm4vla_core.sims.tabletop.tasks import FAMILIES, goals, success

if TYPE_CHECKING:
    from vlm4vla_core.sims.tabletop.render import Picture

CHAIN_TASK = "chain"


def step_limit(task: str) -> int:
    """Most steps of an episode; for a chain, of all five parts together."""
    if task == CHAIN_TASK:
        return scenes.CHAIN_LENGTH * max(FAMILIES[family].step_limit for family in scenes.CHAIN)
    return scenes.LONG[task].step_limit if task in scenes.LONG else FAMILIES[task].step_limit


def begin(task: str, seed: int, *, held_out: bool = False) -> scenes.Start:
    """The start of one episode of any task. Raises InputError on an unknown one."""
    if task == CHAIN_TASK:
        state = scenes.chain_start(seed)
        ask, words = scenes.chain_ask(state, seed, 0, held_out=held_out)
        return scenes.Start(state, (ask,), words)
    starts = scenes.long_start if task in scenes.LONG else scenes.start
    return starts(task, seed, held_out=held_out)


class BatchedEnv:
    """n worlds stepped together. instructions: what each is asked now. running: (n,) which episodes still go on."""

    def __init__(
        self,
        tasks: Sequence[str],
        seeds: Sequence[int],
        domains: Sequence[str],
        image_size: int,
        *,
        last_step: bool = False,
        held_out: bool = False,
    ) -> None:
        """last_step: success counts at the last step only, and no episode ends early."""
        starts = [begin(task, seed, held_out=held_out) for task, seed in zip(tasks, seeds, strict=True)]
        self.n, self.image_size, self.last_step, self.held_out = len(starts), image_size, last_step, held_out
        self.tasks, self.seeds, self.domains = list(tasks), list(seeds), list(domains)
        self.instructions = [start.instruction for start in starts]
        self.state = world.stack([start.state for start in starts])
        most = max(len(start.asks) for start in starts)
        asks = [[start.asks[k] if k < len(start.asks) else None for start in starts] for k in range(most)]
        self.goals: list[Goal] = [goals(self.state, row) for row in asks]
        self.steps, self.done = np.zeros(self.n, int), np.zeros(self.n, int)  # done: parts of a chain that were reached
        self.running, self.renewed = np.ones(self.n, bool), np.ones(self.n, bool)
        self._chains = np.array([task == CHAIN_TASK for task in tasks])
        self._limit = np.array([self._part_limit(i, start.asks[0]) for i, start in enumerate(starts)])  # (n,)
        self._held = np.zeros(self.n, bool)  # the goal holds, or did at some step where that counts

    def _part_limit(self, row: int, ask: Ask) -> int:
        return FAMILIES[ask.family].step_limit if self._chains[row] else step_limit(self.tasks[row])

    def observe(self, rows: np.ndarray | Sequence[int] | None = None, camera: str = "front") -> np.ndarray:
        """Pictures (len(rows), H, W, 3) uint8 by one camera; all worlds when `rows` is None."""
        chosen = np.arange(self.n) if rows is None else np.asarray(rows)
        domains, seeds = [self.domains[row] for row in chosen], [self.seeds[row] for row in chosen]
        return shoot(self.state[chosen], domains, self.image_size, seeds, self.steps[chosen].tolist(), camera).rgb

    def step(self, actions: np.ndarray) -> None:
        """Carry out one action (n, A) per world. Raises InputError on a wrong shape, NaN or infinity."""
        self.state = world.step(self.state, actions)
        self.steps += self.running
        holds = self.success()
        self._held = np.where(self.running, holds | (self._held & ~self._chains & (not self.last_step)), self._held)
        self.renewed = np.zeros(self.n, bool)
        for row in np.flatnonzero(self.running & self._chains & holds):
            self._next(int(row))
        ended = self.steps >= self._limit
        if not self.last_step:
            ended |= self._held & ~self._chains
        ended |= self._chains & (self.done == scenes.CHAIN_LENGTH)
        self.running &= ~ended

    def _next(self, row: int) -> None:
        """One part of a chain is done: ask for the next."""
        self.done[row] += 1
        if self.done[row] == scenes.CHAIN_LENGTH:
            return
        here = self.state[[row]]
        ask, words = scenes.chain_ask(here, self.seeds[row], int(self.done[row]), held_out=self.held_out)
        new = goals(here, [ask])
        for name, values in vars(self.goals[0]).items():
            values[row] = vars(new)[name][0]
        self.instructions[row], self.renewed[row] = words, True
        self._limit[row] = self.steps[row] + self._part_limit(row, ask)

    def success(self) -> np.ndarray:
        """(n,) bool: all that is asked holds now (of a chain: its present part)."""
        return np.all([success(self.state, goal) for goal in self.goals], axis=0)

    def outcome(self, row: int) -> dict[str, Any]:
        """Success, steps, parts of a chain done (None elsewhere), and the share of what was asked that was reached."""
        chain = int(self.done[row]) if self._chains[row] else None
        if chain is not None:
            whole, partial = chain == scenes.CHAIN_LENGTH, chain / scenes.CHAIN_LENGTH
        else:
            whole = bool(self._held[row])
            asked = [goal[[row]] for goal in self.goals if goal.family[row] >= 0]
            partial = 1.0 if whole else float(np.mean([success(self.state[[row]], goal)[0] for goal in asked]))
        return {"success": whole, "steps": int(self.steps[row]), "chain": chain, "partial": round(partial, 4)}

    def expert(self) -> np.ndarray:
        """(n, A) clean actions of the scripted expert, which reads the simulator's state."""
        return expert(self.state, self.goals)


def shoot(
    state: world.State,
    domains: Sequence[str],
    size: int,
    seeds: Sequence[int],
    steps: Sequence[int],
    camera: str,
    *,
    hand: bool = True,
    geometry: bool = False,
) -> Picture:
    """What n worlds look like (see `render.render`), through the sensor of each world's look, where it has one."""
    from vlm4vla_core.sims.tabletop.render import render

    picture = render(state, domains, size, camera=camera, hand=hand, geometry=geometry)
    for i, name in enumerate(domains):
        if (sensor := LOOKS[name].sensor) is not None:
            picture.rgb[i] = degrade(picture.rgb[i], sensor, seeds[i], int(steps[i]))
    return picture
