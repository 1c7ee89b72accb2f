"""Readouts that are trained by steps: a small MLP, and attentive pooling before a linear layer; a grid in one pass.

    fitted = train("mlp", x, labels, parts)

Every member of the grid (learning rate x weight decay), for every set of labels, is trained side by side on the same
batches; the best is chosen on the selection frames, and only it is asked about the test frames.
Trap: a stronger readout finds more everywhere, in pixels and in random features too; read its selectivity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probes.grid import Fitted, Parts, scaling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRID = tuple((rate, decay) for rate in (1e-2, 2e-3) for decay in (1e-2, 0.3))  # learning rate, decoupled weight decay
HIDDEN, EPOCHS, LEAST, BATCH = 128, 40, 400, 256  # width; epochs, but at least so many steps; frames of a step


def train(kind: str, x: np.ndarray, labels: np.ndarray, parts: Parts, *, classes: int = 0, seed: int = 0) -> Fitted:
    """Trained readouts of labels (n, C, k), or class numbers (n, C), from x (n, d), or tokens (n, N, d) if attentive.

    Fitted on the fit frames by AdamW with a cosine schedule over 40 epochs, or 400 steps. scores (G, C) for the members
    of GRID.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = np.arange(len(x)) if x.ndim == 2 else np.arange(x.shape[0] * x.shape[1])
    tokens = x.shape[1] if x.ndim == 3 else 1
    flat = x.reshape(len(rows), x.shape[-1])
    known = parts.fit if tokens == 1 else (parts.fit[:, None] * tokens + np.arange(tokens)).ravel()
    mean, sd = scaling(flat, known)
    z = torch.from_numpy(((flat - mean) / sd).astype(np.float32)).reshape(x.shape)
    y, unit, centre = _targets(labels, parts, classes)
    out = classes or labels.shape[2]
    sets, members = labels.shape[1], len(GRID)
    heads = _start(kind, x.shape[-1], out, members * sets, generator)  # head g * C + c: member g, set c
    rates = torch.tensor([rate for rate, _ in GRID for _ in range(sets)])
    decays = torch.tensor([decay for _, decay in GRID for _ in range(sets)])
    number = [set_ for _ in GRID for set_ in range(sets)]

    fit = torch.from_numpy(parts.fit)
    size = min(BATCH, len(fit))
    steps = max(LEAST, EPOCHS * (len(fit) // size))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in heads]
    order = torch.cat([fit[torch.randperm(len(fit), generator=generator)] for _ in range(-(-steps * size // len(fit)))])
    for step in range(steps):
        batch = order[step * size : (step + 1) * size]
        for parameter in heads:
            parameter.requires_grad_(True)
        loss = _loss(_told(kind, z[batch], heads), y[batch][:, number], classes).sum()
        gradients = torch.autograd.grad(loss, heads)
        share = 0.5 * (1 + np.cos(np.pi * step / steps))
        with torch.no_grad():
            heads = [_adamw(*one, share * rates, decays, step) for one in zip(heads, gradients, moments, strict=True)]
    with torch.no_grad():
        select, test = (torch.cat([_told(kind, part, heads) for part in z[rows_].split(512)]) for rows_ in map(
            torch.from_numpy, parts[1:]))  # fmt: skip
        truth = y[torch.from_numpy(parts.select)][:, number]
        quality = -_loss(select, truth, classes)
        if not classes:  # R² about the fitted mean, which is 0 here
            quality = (1 - (select - truth).square().sum(0) / truth.square().sum(0)).mean(-1)
        scores = quality.reshape(members, sets).numpy().astype(np.float64)
        best = scores.argmax(0)
        chosen = test.reshape(len(test), members, sets, out)[:, torch.from_numpy(best), torch.arange(sets)]  # (m, C, k)
    told = chosen.argmax(2).numpy() if classes else chosen.numpy() * unit + centre
    return Fitted(told, best, scores)


def _targets(labels: np.ndarray, parts: Parts, classes: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Class numbers as they are; quantities about the fitted mean, in units of the fitted spread."""
    import torch

    if classes:
        return torch.from_numpy(labels), np.ones(1), np.zeros(1)
    centre, unit = labels[parts.fit].mean(0), labels[parts.fit].std(0)
    unit = np.where(unit > 0, unit, 1.0)
    return torch.from_numpy(((labels - centre) / unit).astype(np.float32)), unit, centre


def _start(kind: str, width: int, out: int, heads: int, generator: torch.Generator) -> list[Tensor]:
    """Parameters of all heads, the head first. mlp: w, b, w, b. attentive: query, w, b."""
    import torch

    def drawn(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    if kind == "attentive":
        first = [drawn(heads, width, scale=0.1 * width**-0.5)]
        return [*first, drawn(heads, width, out, scale=width**-0.5), torch.zeros(heads, 1, out)]
    first = [drawn(heads, width, HIDDEN, scale=width**-0.5), torch.zeros(heads, 1, HIDDEN)]
    return [*first, drawn(heads, HIDDEN, out, scale=HIDDEN**-0.5), torch.zeros(heads, 1, out)]


def _told(kind: str, z: Tensor, heads: list[Tensor]) -> Tensor:
    """(B, d) or (B, N, d) -> (B, heads, out)."""
    import torch

    if kind == "attentive":
        query, w, b = heads
        weight = torch.einsum("bnd,hd->bhn", z, query).softmax(-1)
        seen = torch.einsum("bhn,bnd->hbd", weight, z)
        return (seen @ w + b).transpose(0, 1)
    w1, b1, w2, b2 = heads
    return (torch.nn.functional.gelu(z @ w1 + b1) @ w2 + b2).transpose(0, 1)


def _loss(told: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Mean loss of every head (heads,): cross-entropy, or squared error."""
    import torch

    if classes:
        return (
            torch.nn.functional.cross_entropy(told.flatten(0, 1), truth.flatten(), reduction="none")
            .reshape(truth.shape)
            .mean(0)
        )
    return (told - truth).square().mean((0, 2))


def _adamw(
    value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rates: Tensor, decays: Tensor, step: int
) -> Tensor:
    """One step of AdamW (Loshchilov and Hutter 2019), with each head's own rate and decay; biases decay too."""
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.001)
    rate = rates.reshape(-1, *[1] * (value.dim() - 1))
    decay = decays.reshape(-1, *[1] * (value.dim() - 1))
    move = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return value.detach() * (1 - rate * decay) - rate * move
