"""Which parts of a picture move one number of a policy's answer: attribution on image tokens and pixels, with checks.

    lens = Lens(policy, image, instruction, target_of(policy.config, "x"))
    found = explain(lens, "ig")                  # found.cells (g, g): one score for each place, in raster order
    faithfulness(lens, found, seed=0)            # does hiding the best-scored places first change the answer most?

Methods: "ig" (integrated gradients, Sundararajan et al. 2017) and "gradxact" (gradient x activation) on the tokens that
the projector gives the decoder, "ig-pixels", "occlusion" (a place painted over) and "ablation" (its tokens replaced).
What is taken away becomes the picture's mean colour or mean token. For token methods the vision blocks run once; what
they hand on beside the tokens (Qwen3-VL's DeepStack features) stays fixed.
Traps: a zero baseline breaks completeness (patch embedding and norm are singular there), and gradient x activation
summed over channels at the last vision block is 0 by construction, since only a norm reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

METHODS = ("ig", "ig-pixels", "gradxact", "occlusion", "ablation")
ON_PIXELS = ("ig-pixels", "occlusion")
FIRST_STEPS, MAX_STEPS = 32, 512
RELATIVE, ABSOLUTE = 0.02, 1e-3  # completeness: |delta| of |F(x) - F(x')|, or in normalised units
POINTS = 16  # places of a faithfulness curve between everything and nothing


class Target(NamedTuple):
    """One number of the answer: `dim` of the arm (normalised), or None for the gripper's logit; `step` of
    the chunk. unit: what 1 of it is, in words."""

    name: str
    dim: int | None
    step: int
    unit: str


def target_of(config: PolicyConfig, name: str, step: int = 0) -> Target:
    """The target of that name. Raises InputError for a dimension or chunk step that the policy does not predict."""
    names = config.convention.names
    known = [*names[:-1], "gripper"]
    if name not in (*known, names[-1]):
        raise InputError(f"no action dimension '{name}'", fix=nearest(name, known))
    if not 0 <= step < config.chunk:
        raise InputError(f"no chunk step {step}", fix=f"this policy predicts steps 0 to {config.chunk - 1}")
    if name in ("gripper", names[-1]):
        return Target("gripper", None, step, "logit, positive opens")
    dim = names.index(name)
    unit = f"normalised action, 1 is {config.unit()[dim]:.3g} {config.convention.units[dim]}"
    return Target(name, dim, step, unit)


class Seen(Protocol):
    """What the methods need of a picture that a model looks at (see `Lens`)."""

    pixels: Tensor
    side: int
    pixel_places: Tensor

    @property
    def tokens(self) -> Tensor: ...
    @property
    def token_places(self) -> Tensor: ...
    def from_pixels(self, pixels: Tensor) -> Tensor: ...
    def from_tokens(self, tokens: Tensor) -> Tensor: ...


class Lens:
    """One picture and instruction before a policy, as functions of its pixels and of its image tokens.

    pixels: (1, 3, H, W), normalised. tokens: (1, n, D), as the projector orders them. side: places per side.
    pixel_places (H, W) and token_places (n,): the place of each, in raster order, 0 to side² - 1.
    """

    def __init__(self, policy: VLAPolicy, image: np.ndarray, instruction: str, target: Target) -> None:
        """image: uint8 (H, W, 3). The policy is put in eval mode, its parameters need no gradients afterwards."""
        import torch

        self.policy, self.target = policy.eval().requires_grad_(False), target
        self.spec, self.geometry = policy.backbone.spec, policy.backbone.geometry
        self._one = policy.backbone.collate(image[None], [instruction])
        device, form = policy.backbone.device, (1, 3, 1, 1)
        mean, std = (torch.tensor(value, device=device).view(form) for value in (self.spec.mean, self.spec.std))
        self.pixels = (self._one.pop("images").to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std
        self.side = self.geometry.grid // self.geometry.merge
        cell = self.geometry.patch * self.geometry.merge
        line = (torch.arange(self.geometry.size, device=device) // cell).clamp(max=self.side - 1)
        self.pixel_places = line[:, None] * self.side + line[None]  # (H, W)

    def _batch(self, pixels: Tensor) -> dict[str, Tensor]:
        """The one prompt, as often as there are pictures."""
        out = {}
        for name, value in self._one.items():
            row = 1 if name == "position_ids" and value.dim() == 3 else 0  # (3, 1, L)
            out[name] = value.repeat_interleave(len(pixels), row)
        return out | self.spec.pixel_inputs(pixels.to(self.policy.backbone.base.dtype), self.geometry)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Target (B,) of pictures (B, 3, H, W), normalised."""
        arm, logits = self.policy.outputs(self._batch(pixels))
        step = self.target.step
        return logits[:, step] if self.target.dim is None else arm[:, step, self.target.dim]

    @cached_property
    def _seen(self) -> tuple[list[Any], Tensor]:
        """Outputs of the vision blocks and of the projector for the picture: the one run of the vision tower."""
        import torch

        blocks, projector = self._modules()
        outputs: list[Any] = [None] * (len(blocks) + 1)
        with ExitStack() as stack, torch.no_grad():
            for place, module in enumerate([*blocks, projector]):

                def keep(module: nn.Module, args: Any, out: Any, place: int = place) -> None:
                    outputs[place] = out

                stack.callback(module.register_forward_hook(keep).remove)
            self.from_pixels(self.pixels)
        return outputs[:-1], outputs[-1]

    def _modules(self) -> tuple[list[nn.Module], nn.Module]:
        base: Any = self.policy.backbone.base
        return list(base.get_submodule(self.spec.blocks)), base.get_submodule(self.spec.projector[0])

    @cached_property
    def tokens(self) -> Tensor:
        """(1, n, D). Raises InputError where image tokens lie on no grid."""
        if not self.spec.spatial:
            what = f"the image tokens of {self.spec.name} are latents that lie on no grid"
            raise InputError(what, fix="attribute on pixels: --method ig-pixels or occlusion")
        return self._seen[1].reshape(1, -1, self._seen[1].shape[-1])

    @cached_property
    def token_places(self) -> Tensor:
        import torch

        count, cells = self.tokens.shape[1], self.side**2
        native = torch.arange(cells, device=self.tokens.device, dtype=torch.float32)[None, :, None]
        raster = self.spec.raster(native, self.geometry, True)[0, :, 0].long()  # native number of each place
        place = torch.empty_like(raster)
        place[raster] = torch.arange(cells, device=raster.device)
        return place.repeat(count // cells)  # LLaVA-OneVision shows the picture twice

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Target (B,) of image tokens (B, n, D) in place of the picture's own; the vision blocks do not run."""
        count = len(tokens)
        with self._vision_stands_still(count):
            shape = (count * self._seen[1].shape[0], *self._seen[1].shape[1:])
            handle = self._modules()[1].register_forward_hook(lambda *_: tokens.reshape(shape))
            try:
                return self.from_pixels(self.pixels.expand(count, -1, -1, -1))
            finally:
                handle.remove()

    @contextmanager
    def _vision_stands_still(self, count: int) -> Iterator[None]:
        blocks = self._modules()[0]
        try:
            for block, out in zip(blocks, self._seen[0], strict=True):
                object.__setattr__(block, "forward", lambda *_, out=out, **__: _repeated(out, count))
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)


def _repeated(out: Any, count: int) -> Any:
    if isinstance(out, tuple):
        return tuple(_repeated(part, count) for part in out)
    return out.repeat(count, *[1] * (out.dim() - 1)) if hasattr(out, "repeat") else out


# --- methods --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribution:
    """cells: (side, side) scores in raster order, in the target's unit; positive raised it above the baseline.
    pixels: (H, W) where the method has them, else None. value, baseline: target of the picture, and of the picture
    with everything taken away. delta: sum of scores - (value - baseline), and n_steps, of integrated gradients."""

    method: str
    cells: np.ndarray
    pixels: np.ndarray | None
    value: float
    baseline: float
    delta: float | None = None
    n_steps: int | None = None

    @property
    def complete(self) -> bool | None:
        """Integrated gradients: whether |delta| is at most 2 % of |value - baseline| or 1e-3."""
        if self.delta is None:
            return None
        return abs(self.delta) <= max(RELATIVE * abs(self.value - self.baseline), ABSOLUTE)


def explain(
    lens: Seen, method: str, *, batch_size: int = 16, max_steps: int = MAX_STEPS, strict: bool = True
) -> Attribution:
    """Scores of every place of a picture. Deterministic.

    Integrated gradients start with 32 steps, doubled up to `max_steps` until they are complete; strict: raises
    InputError when they are not complete then. Raises InputError for an unknown method, and for token methods where
    image tokens lie on no grid.
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}'", fix=nearest(method, METHODS))
    import torch

    function, x, baseline, places = _input(lens, method)
    with torch.no_grad():
        value, zero = (float(function(one)[0]) for one in (x, baseline))
    delta = n_steps = None
    if method in ("ig", "ig-pixels"):
        scores, delta, n_steps = integrate(function, x, baseline, value - zero, batch_size, max_steps)
    elif method == "gradxact":
        from captum.attr import InputXGradient

        scores = InputXGradient(function).attribute(x.detach().requires_grad_())
    else:
        from captum.attr import FeatureAblation

        mask = places[None, None] if method == "occlusion" else places[None, :, None]
        with torch.no_grad():
            scores = FeatureAblation(function).attribute(
                x, baselines=baseline, feature_mask=mask, perturbations_per_eval=batch_size
            )
    # (H, W) or (n,): captum gives every member of an ablated place the place's whole score.
    whole = method in ("occlusion", "ablation")
    axis = 0 if method in ON_PIXELS else 1
    flat = scores.detach()[0].double().mean(axis) if whole else scores.detach()[0].double().sum(axis)
    sums = torch.zeros(lens.side**2, dtype=torch.float64, device=flat.device)
    sums.index_add_(0, places.flatten(), flat.flatten())
    if whole:
        sums /= places.flatten().bincount(minlength=lens.side**2)
    cells = sums.reshape(lens.side, lens.side).cpu().numpy()
    pixels = flat.cpu().numpy() if method == "ig-pixels" else None
    found = Attribution(method, cells, pixels, value, zero, delta, n_steps)
    if strict and found.complete is False:
        raise InputError(
            f"integrated gradients are not complete after {n_steps} steps: they miss the difference of "
            f"{value - zero:.3g} by {delta:.2g}, and {RELATIVE:.0%} or {ABSOLUTE:g} is allowed",
            fix="use --method occlusion, which needs no path",
        )
    return found


def _input(lens: Seen, method: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """The function that a method looks into, its input, its baseline and the place of each element."""
    if method in ON_PIXELS:
        x = lens.pixels
        return lens.from_pixels, x, x.mean((2, 3), keepdim=True).expand_as(x), lens.pixel_places
    x = lens.tokens
    return lens.from_tokens, x, x.mean(1, keepdim=True).expand_as(x), lens.token_places


def integrate(
    function: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, difference: float, batch_size: int,
    max_steps: int = MAX_STEPS,
) -> tuple[Tensor, float, int]:  # fmt: skip
    """Integrated gradients of function (B, …) -> (B,) at x (1, …) by Gauss-Legendre: scores shaped as x, delta, steps.

    The number of steps starts at 32 and doubles until the scores' sum meets `difference`, F(x) - F(baseline), or
    `max_steps` is reached.
    """
    from captum.attr import IntegratedGradients

    method, steps = IntegratedGradients(function), min(FIRST_STEPS, max_steps)
    while True:
        scores = method.attribute(x, baselines=baseline, n_steps=steps, internal_batch_size=batch_size)
        delta = float(scores.double().sum()) - difference
        if abs(delta) <= max(RELATIVE * abs(difference), ABSOLUTE) or steps >= max_steps:
            return scores, delta, steps
        steps = min(2 * steps, max_steps)


# --- checks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faithfulness:
    """hidden: (k,) share of places hidden, 0 to 1. deletion: (k,) target minus baseline, its sign turned so that the
    whole picture's is positive, as places are hidden, best-scored first; insertion: (k,) as places come back,
    best-scored first, also over `hidden`. random: (r, k) hidden in random orders; a null for both, since showing
    places in one order is hiding them in the reverse."""

    hidden: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray
    random: np.ndarray

    def areas(self) -> dict[str, float]:
        """Areas under both curves and of the random orders (mean, 2.5 and 97.5 %), and the share of random orders at
        least as good: a smaller area of deletion, a larger one of insertion."""
        deletion, insertion = (float(np.trapezoid(curve, self.hidden)) for curve in (self.deletion, self.insertion))
        null = np.trapezoid(self.random, self.hidden, axis=1)
        low, high = np.quantile(null, [0.025, 0.975])
        ranks = {"deletion_p": (1 + (null <= deletion).sum()) / (1 + len(null))}
        ranks["insertion_p"] = (1 + (null >= insertion).sum()) / (1 + len(null))
        areas = {"deletion": deletion, "insertion": insertion, "random": float(null.mean())}
        return {
            **areas,
            "random_low": float(low),
            "random_high": float(high),
            **{k: float(v) for k, v in ranks.items()},
        }


def faithfulness(lens: Seen, found: Attribution, *, seed: int, orders: int = 20, batch_size: int = 16) -> Faithfulness:
    """Deletion and insertion curves (Petsiuk et al. 2018) of an attribution, beside `orders` random orders.

    Places are hidden as in the method itself: mean colour, or mean token.
    """
    sign = 1.0 if found.value >= found.baseline else -1.0
    count = found.cells.size
    best = np.argsort(-sign * found.cells.ravel(), kind="stable")
    rng = np.random.default_rng(seed)
    sequences = [best, best[::-1], *(rng.permutation(count) for _ in range(orders))]
    taken = np.unique(np.round(np.linspace(0, count, min(POINTS, count) + 1)).astype(int))
    keep = np.ones((len(sequences), len(taken), count), bool)
    for which, sequence in enumerate(sequences):
        for point, number in enumerate(taken):
            keep[which, point, sequence[:number]] = False
    values = sign * (hide(lens, found.method, keep.reshape(-1, count), batch_size) - found.baseline)
    curves = values.reshape(len(sequences), len(taken))
    return Faithfulness(taken / count, curves[0], curves[1], curves[2:])


def hide(lens: Seen, method: str, keep: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """Target (b,) with only some places left: keep (b, side²), False where the baseline takes a place's stead."""
    import torch

    function, x, baseline, places = _input(lens, method)
    out = []
    with torch.no_grad():
        for start in range(0, len(keep), batch_size):
            part = torch.from_numpy(keep[start : start + batch_size]).to(x.device)
            mask = part[:, places]  # (B, H, W) or (B, n)
            mask = mask[:, None] if method in ON_PIXELS else mask[..., None]
            out.append(function(torch.where(mask, x, baseline)).double().cpu())
    return torch.cat(out).numpy()


def randomised(policy: VLAPolicy, fresh: VLAPolicy) -> Iterator[tuple[str, VLAPolicy]]:
    """The policy with more and more weights drawn anew, from the answer to the picture, in place: head, decoder (with
    query and words), projector, vision ("cascading", Adebayo et al. 2018). fresh: an untrained policy of its shape."""
    import torch

    groups = {f"backbone.{name}": group.split(".")[0] for name, group in policy.backbone.groups().items()}
    new = dict(fresh.named_parameters())
    stages = {"head": ("head",), "decoder": ("decoder", "embeddings", "query", "lm_head")}
    stages |= {"projector": ("projector",), "vision": ("vision",)}
    for stage, members in stages.items():
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if groups.get(name, "head") in members:
                    parameter.copy_(new[name])
        yield stage, policy


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two maps; NaN when one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(value) for value in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(np.ptp(rank) for rank in ranks) > 0 else float("nan")


def sanity_frame(before: Sequence[Attribution], after: Mapping[str, Sequence[Attribution]]) -> pd.DataFrame:
    """One row per stage: mean rank correlation over pictures of the maps before and after, as they are (`signed`) and
    without their signs (`absolute`), with the number of pictures and places."""
    import pandas as pd

    rows = []
    for stage, found in after.items():
        pairs = [(old.cells, new.cells) for old, new in zip(before, found, strict=True)]
        signed = [rank_correlation(*pair) for pair in pairs]
        absolute = [rank_correlation(abs(old), abs(new)) for old, new in pairs]
        rows.append((stage, *(float(np.mean(v)) for v in (signed, absolute)), len(pairs), pairs[0][0].size))
    return pd.DataFrame(rows, columns=["randomised", "signed", "absolute", "pictures", "places"])
