"""What this design could have shown, and what it would take: power over models and over episodes, for one pair.

Trap: reliability is itself uncertain and an upper bound, so the episodes named here are a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from probes.power import models_for_power, power_of_r

RHOS = (0.5, 0.8)
WANTED = 0.8  # reliability, and power


@dataclass(frozen=True)
class Chance:
    """Power to see rho with this pair's n (true scores; and as its noisy scores show it), and the n for 80 %."""

    rho: float
    power_true: float
    power: float | None
    models_true: int | None
    models: int | None


@dataclass(frozen=True)
class MoreEpisodes:
    """With so many episodes a model: reliability, the largest |r| to be expected, and the power to see rho 0.8."""

    episodes: int
    reliability: float
    ceiling: float
    power: float


@dataclass(frozen=True)
class Outlook:
    """episodes: of a model now (mean). episodes_for_reliability: for 0.8; None where reliability is unknown or 0."""

    chances: tuple[Chance, ...]
    episodes: int | None
    episodes_for_reliability: int | None
    over_episodes: tuple[MoreEpisodes, ...]


def outlook(n: int, reliability: float | None, episodes: float | None) -> Outlook:
    """n: models; reliability, episodes (a model's, over all tasks): None where unknown."""
    seen = 0.0 if reliability is None else reliability**0.5
    chances = tuple(
        Chance(
            rho,
            _power(rho, n),
            None if reliability is None else _power(rho * seen, n),
            models_for_power(rho),
            None if reliability is None else models_for_power(rho * seen),
        )
        for rho in RHOS
    )
    if reliability is None or episodes is None or not 0 < reliability < 1:
        return Outlook(chances, None if episodes is None else round(episodes), None, ())
    odds = reliability / (1 - reliability)  # grows in proportion to the episodes
    more = []
    for factor in (1, 2, 4, 8, 16):
        share = factor * odds / (1 + factor * odds)
        more.append(MoreEpisodes(round(episodes * factor), share, share**0.5, _power(0.8 * share**0.5, n)))
    needed = max(1, round(episodes * WANTED / (1 - WANTED) / odds))
    return Outlook(chances, round(episodes), needed, tuple(more))


def _power(rho: float, n: int) -> float:
    return power_of_r(rho, n) if n > 3 else float("nan")
