"""Writes nine_models.json: the paper's three correlations by brute force, with nothing but the standard library.

    python tests/oracles/nine_models.py        # some seconds

Numbers as printed in the paper's main table and as read off its capability scatter. Every one of the 9! (and, within
lineages, 6! 2! 1!) arrangements is visited by itertools and judged in exact rational arithmetic, so that ties are ties:
|r*| >= |r| is (sum of centred products)^2 compared as integers.
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

CAPABILITY = ["-0.557", "0.482", "1.163", "2.183", "3.143", "4.043", "5.763", "6.503", "6.763"]
PERFORMANCE = {
    "CALVIN ABC-D": ["3.096", "3.506", "3.406", "3.856", "4.057", "4.142", "3.943", "4.035", "4.075"],
    "SimplerEnv-Bridge": ["60.4", "55.3", "57.3", "48.0", "46.9", "49.0", "56.3", "58.3", "44.8"],
    "LIBERO-10": ["55.0", "44.2", "46.2", "43.0", "45.0", "55.8", "44.4", "46.2", "46.8"],
}
LINEAGES = ((0,), (1, 2), (3, 4, 5, 6, 7, 8))  # Kosmos, PaliGemma, Qwen


def centred(values: list[str]) -> list[int]:
    """n times the deviations from the mean, in thousandths: whole numbers."""
    whole = [int(Fraction(value) * 1000) for value in values]
    return [len(whole) * value - sum(whole) for value in whole]


def ranks(values: list[str]) -> list[str]:
    numbers = [Fraction(value) for value in values]
    return [str(Fraction(sum(o < v for o in numbers) * 2 + sum(o == v for o in numbers) + 1, 2)) for v in numbers]


def product(a: list[int], b: list[int]) -> int:
    return sum(u * v for u, v in zip(a, b, strict=True))


def counts(x: list[int], columns: list[list[int]], arrangements) -> tuple[list[int], list[int], int]:
    """How many arrangements reach |r|, and how many have some column reach it (compared as r^2, exactly)."""
    norms = [product(y, y) for y in columns]
    scale = math.lcm(*norms)
    factors = [scale // norm for norm in norms]  # r^2 of different columns on one integer scale
    goal = [product(x, y) ** 2 for y in columns]
    single, largest, total = [0] * len(columns), [0] * len(columns), 0
    for order in arrangements:
        moved = [x[i] for i in order]
        squares = [product(moved, y) ** 2 for y in columns]
        top = max(s * f for s, f in zip(squares, factors, strict=True))
        for j, square in enumerate(squares):
            single[j] += square >= goal[j]
            largest[j] += top >= goal[j] * factors[j]
        total += 1
    return single, largest, total


def within():
    for parts in itertools.product(*(itertools.permutations(block) for block in LINEAGES)):
        yield [i for part in parts for i in part]


def main() -> None:
    names = list(PERFORMANCE)
    x, columns = centred(CAPABILITY), [centred(PERFORMANCE[name]) for name in names]
    every = list(itertools.permutations(range(9)))
    single, largest, total = counts(x, columns, every)
    rank_single, _, _ = counts(centred(ranks(CAPABILITY)), [centred(ranks(PERFORMANCE[n])) for n in names], every)
    inside, _, inside_total = counts(x, columns, within())
    out = {
        name: {
            "r": product(x, y) / math.sqrt(product(x, x) * product(y, y)),
            "p_exact": [single[j], total],
            "p_max_r": [largest[j], total],
            "p_spearman": [rank_single[j], total],
            "p_within_lineage": [inside[j], inside_total],
        }
        for j, (name, y) in enumerate(zip(names, columns, strict=True))
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
