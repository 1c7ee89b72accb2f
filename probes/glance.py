"""One line per module: what is known of where VLM and VLA training part, and what is missing to say more.

Trap: weights of one run per arm allow no verdict. Two runs of one arm differ too, and only they say by how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from probes.parting import Parting

MODULES = {"vision": "vision tower"}


def module_of(group: str) -> str:
    """ "vision.3" -> "vision tower", "decoder.0" -> "decoder"."""
    part = group.split(".")[0]
    return MODULES.get(part, part)


def glance(weights: pd.DataFrame, parting: Parting | None = None) -> list[str]:
    """Lines such as "vision tower: the arms part after step 64 (…)".

    weights: `WeightDivergence.to_frame()`, perhaps with ceiling_a and ceiling_c. Without recorded paths of four seeds
    per arm the line gives the angle of the changes beside the random null and the ceiling, or says that there is none.
    """
    if parting is not None:
        return [f"{name}: {found.verdict}" for name, found in parting.modules.items()]
    lines = []
    for module, rows in weights.groupby(weights["group"].map(module_of), sort=False):
        known = rows["cosine"].notna()
        if not known.any():
            lines.append(f"{module}: one of the two did not move it, so there is no angle")
            continue
        count = int((rows["cosine"].abs() > 3 * rows["null_sd"])[known].sum())
        low, high = np.nanmin(rows["cosine"]), np.nanmax(rows["cosine"])
        ceilings = [rows[name][known].mean() for name in ("ceiling_a", "ceiling_c") if name in rows]
        told = " and ".join(f"{value:+.2f}" for value in ceilings if value == value)
        told = f"other seeds of one training {told}" if told else "no ceiling (one seed per arm)"
        lines.append(
            f"{module}: cosine of the changes {low:+.2f} to {high:+.2f}, beyond 3 sd of random changes in {count} of "
            f"{int(known.sum())} groups; {told}, so whether the arms part is undetermined"
        )
    return lines
