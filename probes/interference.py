"""What a step on one objective does to the losses of all, measured by taking it and taking it back.

    interference(parameters, {"language": …, "action": …}).to_frame()     # change of each loss by a step on each

The step is along the gradient of one half-batch and the losses are those of another, so that a step is not judged by
the data it was made from. Trap: the change is that of a step of this length at these weights. A long step raises every
loss, whatever the angle; the cosine of the gradients is its limit for short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.gradients import requiring_gradients
from probes.losses import Loss
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

FORMS = ("raw", "adamw")
STEP = 1e-3  # of the norm of all parameters


@dataclass(frozen=True)
class Interference:
    """changes: (form, step on, loss of) -> (K,) change of the loss, one per batch; before: loss of -> (K,)."""

    changes: dict[tuple[str, str, str], np.ndarray]
    before: dict[str, np.ndarray]
    step: float

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """form, step_on, loss_of, change, low, high (t over batches), relative (to the loss before), batches."""
        import pandas as pd
        from scipy.stats import t

        rows = []
        for (form, on, of), values in self.changes.items():
            half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
            mean = float(values.mean())
            rows.append((form, on, of, mean, mean - half, mean + half, mean / self.before[of].mean(), len(values)))
        return pd.DataFrame(
            rows, columns=["form", "step_on", "loss_of", "change", "low", "high", "relative", "batches"]
        )


def interference(
    parameters: Mapping[str, Any], losses: Mapping[str, Loss], *, batches: int = 8, step: float = STEP,
    progress: Callable[[int], Any] | None = None,
) -> Interference:  # fmt: skip
    """Change of every loss by one step on every loss.

    parameters: those that step, by name. losses: name -> loss of (batch, half). A step is `step` times the norm of all
    parameters long: "raw" along the gradient, "adamw" as AdamW's first (the gradient's signs). Weights are put back to
    the bit. Raises InputError for fewer than 2 batches and a step that is not positive.
    """
    import torch

    if batches < 2:
        raise InputError(f"{batches} batch cannot give an interval over batches", fix="use --batches 2 or more")
    if not step > 0:
        raise InputError(f"a step of {step}", fix="use a positive length")
    weights = list(parameters.values())
    kept = [weight.detach().clone() for weight in weights]
    length = step * float(torch.stack([weight.double().square().sum() for weight in kept]).sum().sqrt())
    changes = {(form, on, of): np.empty(batches) for form in FORMS for on in losses for of in losses}
    before = {of: np.empty(batches) for of in losses}

    def measured(k: int) -> dict[str, float]:
        with torch.no_grad():
            return {of: float(loss(k, 1)) for of, loss in losses.items()}

    try:
        with requiring_gradients(weights):
            for k in range(batches):
                start = measured(k)
                for of, value in start.items():
                    before[of][k] = value
                for on, loss in losses.items():
                    gradients = torch.autograd.grad(loss(k, 0), weights, allow_unused=True)
                    for form in FORMS:
                        _move(weights, kept, [_along(g, form) for g in gradients], length)
                        for of, value in measured(k).items():
                            changes[form, on, of][k] = value - start[of]
                        _move(weights, kept, [None] * len(weights), 0.0)
                if progress:
                    progress(1)
    finally:
        _move(weights, kept, [None] * len(weights), 0.0)
    return Interference(changes, before, step)


def _along(gradient: Any, form: str) -> Any:
    return gradient if gradient is None or form == "raw" else gradient.sign()


def _move(weights: list[Any], kept: list[Any], directions: list[Any], length: float) -> None:
    """Set the weights to the kept ones minus `length` along the directions together (None: not at all)."""
    import torch

    norm = float(sum(float(d.double().square().sum()) for d in directions if d is not None)) ** 0.5
    with torch.no_grad():
        for weight, start, direction in zip(weights, kept, directions, strict=True):
            weight.copy_(start)
            if direction is not None and norm > 0:
                weight.sub_(direction, alpha=length / norm)
