"""Where rays enter a ball, a box or a cylinder around the origin: elementwise float32 arithmetic in torch.

Each function takes origins and directions as three tensors (r, w) each and half extents (r, 1) each, and gives the
ray's parameter (r, w) at its first meeting with the surface, and whether (r, w) there is one.

Trap: the parameter may be negative, of what lies behind the origin; who calls drops it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Axes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def ball(o: Axes, d: Axes, half: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    # From the foot of the perpendicular: far more exact in float32 than the textbook quadratic.
    (ox, oy, oz), (dx, dy, dz), r = o, d, half[0]
    dd = dx * dx + dy * dy + dz * dz
    foot = -(ox * dx + oy * dy + oz * dz) / dd
    x, y, z = ox + foot * dx, oy + foot * dy, oz + foot * dz
    inside = (r * r - (x * x + y * y + z * z)) / dd
    return foot - inside.clamp(min=0.0).sqrt(), inside > 0


def box(o: Axes, d: Axes, half: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    enters, leaves = [], []
    for origin, step, h in zip(o, d, half, strict=True):
        step = torch.where(step.abs() < 1e-9, 1e-9, step)
        a, b = (-h - origin) / step, (h - origin) / step
        enters.append(torch.minimum(a, b))
        leaves.append(torch.maximum(a, b))
    near = torch.maximum(torch.maximum(enters[0], enters[1]), enters[2])
    far = torch.minimum(torch.minimum(leaves[0], leaves[1]), leaves[2])
    return near, near < far


def cylinder(o: Axes, d: Axes, half: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    (ox, oy, oz), (dx, dy, dz), (r, _, h) = o, d, half
    dd = (dx * dx + dy * dy).clamp(min=1e-12)
    foot = -(ox * dx + oy * dy) / dd
    x, y = ox + foot * dx, oy + foot * dy
    inside = (r * r - (x * x + y * y)) / dd
    side = foot - inside.clamp(min=0.0).sqrt()
    on_side = (inside > 0) & ((oz + side * dz).abs() <= h)
    steep = torch.where(dz.abs() < 1e-9, -1e-9, dz)
    cap = (-steep.sign() * h - oz) / steep
    x, y = ox + cap * dx, oy + cap * dy
    on_cap = x * x + y * y <= r * r
    return torch.where(on_cap, cap, side), on_side | on_cap


HIT = (box, ball, cylinder)  # as world.KINDS
