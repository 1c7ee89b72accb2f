"""Chunks of predicted actions, played out one action at a time, alone or ensembled over time.

Temporal ensembling (Zhao et al. 2023, ACT, arXiv 2304.13705): every chunk that still covers this moment has a say, the
oldest weighs most: exp(-0.01 i), i counted from the oldest.

Trap: ensembling without replanning in between (`execute` as long as the chunk) has nothing to average.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.actions import ActionConvention

ENSEMBLES = ("none", "temporal")
_DECAY = 0.01  # ACT's


class Playback:
    """One episode's actions. execute: actions carried out before the next look."""

    def __init__(self, convention: ActionConvention, execute: int, ensemble: str = "none") -> None:
        self._convention, self._execute, self._temporal = convention, execute, ensemble == "temporal"
        self._chunks: list[tuple[int, np.ndarray]] = []  # the moment each begins at, oldest first
        self._now, self._look = 0, 0

    def wants(self, renewed: bool) -> bool:
        """Whether a new chunk has to come first; new words end all that was planned."""
        if renewed:
            self._chunks, self._look = [], self._now
        return self._now >= self._look

    def add(self, chunk: np.ndarray) -> None:
        """A chunk (C, A) that begins now."""
        self._chunks = [*self._chunks, (self._now, chunk)] if self._temporal else [(self._now, chunk)]
        self._look = self._now + self._execute

    def next(self) -> np.ndarray:
        """The action (A,) of this moment; time goes on."""
        self._chunks = [(start, chunk) for start, chunk in self._chunks if self._now < start + len(chunk)]
        said = np.stack([chunk[self._now - start] for start, chunk in self._chunks])  # (k, A), oldest first
        self._now += 1
        if len(said) == 1:
            return said[0]
        weights = np.exp(-_DECAY * np.arange(len(said)))
        action = weights @ said / weights.sum()
        opened, closed = self._convention.gripper_open, self._convention.gripper_closed
        action[-1] = opened if abs(action[-1] - opened) <= abs(action[-1] - closed) else closed
        return action
