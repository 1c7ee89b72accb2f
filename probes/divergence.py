"""Where VLM training and VLA training part: in what they did to the weights, and in which way their gradients pull.

    weight_divergence(base, vlm, vla).to_frame()            # per module group: |A - B|/|B|, |C - B|/|B|, their cosine
    gradient_divergence(policy, asked, shown).to_frame()    # per module group: cosine of the two losses' gradients

A is the VLM-trained checkpoint, C the VLA-trained one, B the base of both. Trap: with millions of parameters a cosine
of 0.01 lies many standard deviations from that of random deltas and may still mean nothing; two runs of the *same*
objective from other seeds are the comparison that counts. The random null is the lower bar, not the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probes.weights import family_at, network_order, open_weights
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probes.gradients import GradientDivergence
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy

PIECE = 1 << 23  # elements that are held in float64 at once: 64 MiB


# --- weights ------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What is added up over parameters: their number, |B|², |A - B|², |C - B|² and <A - B, C - B>."""

    n: int
    base: float
    a: float
    c: float
    dot: float


@dataclass(frozen=True)
class WeightDivergence:
    """The two deltas from one base. parameters: name -> (group, sums). unmatched: names that are not in all three,
    with where they are. excluded: parts that are new in the policy (head and query)."""

    parameters: dict[str, tuple[str, Sums]]
    unmatched: tuple[str, ...]
    excluded: tuple[str, ...]

    @property
    def groups(self) -> dict[str, Sums]:
        """Sums per module group, in the order of the network."""
        found: dict[str, list[Sums]] = {}
        for group, sums in self.parameters.values():
            found.setdefault(group, []).append(sums)
        return {group: _added(found[group]) for group in sorted(found, key=network_order)}

    @property
    def total(self) -> Sums:
        """Sums over all compared parameters."""
        return _added([sums for _, sums in self.parameters.values()])

    def to_frame(self) -> pd.DataFrame:
        """One row per module group: group, n_params, rel_norm_a, rel_norm_c, cosine, null_sd.

        rel_norm: |A - B| / |B| (NaN where the base is zero). cosine: between the deltas, NaN when one of them is
        zero. null_sd: standard deviation of that cosine for two independent random deltas, 1 / sqrt(n_params).
        """
        return self._frame("group", self.groups)

    def parameter_frame(self) -> pd.DataFrame:
        """As `to_frame`, one row per parameter: parameter, n_params, rel_norm_a, …"""
        return self._frame("parameter", {name: sums for name, (_, sums) in self.parameters.items()})

    @staticmethod
    def _frame(label: str, rows: Mapping[str, Sums]) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame({label: name, **describe(sums)} for name, sums in rows.items())


def describe(sums: Sums) -> dict[str, float]:
    """n_params, rel_norm_a, rel_norm_c, cosine and null_sd of one sum."""
    with np.errstate(divide="ignore", invalid="ignore"):
        base = np.sqrt(sums.base) if sums.base > 0 else np.nan
        moved = sums.a > 0 and sums.c > 0
        return {
            "n_params": sums.n,
            "rel_norm_a": float(np.sqrt(sums.a) / base),
            "rel_norm_c": float(np.sqrt(sums.c) / base),
            "cosine": float(np.clip(sums.dot / np.sqrt(sums.a * sums.c), -1, 1)) if moved else float("nan"),
            "null_sd": float(1 / np.sqrt(sums.n)),
        }


def weight_divergence(base: Path | str, a: Path | str, c: Path | str) -> WeightDivergence:
    """Compare two checkpoints with the base both started from, tensor by tensor.

    base, a, c: checkpoint, run or published folders, or single safetensors files. Sums run in float64 over pieces,
    so memory stays flat in the size of the model. Raises InputError for unreadable files, a shape that differs
    (naming the tensor) and checkpoints without a common parameter.
    """
    with ExitStack() as stack:
        paths = [Path(path) for path in (base, a, c)]
        known = next((found for path in paths if (found := family_at(path))), None)
        sides = [stack.enter_context(open_weights(path, known)) for path in paths]
        families = sorted({side.family.name for side in sides if side.family})
        if len(families) > 1:
            raise InputError(f"checkpoints of different families: {', '.join(families)}", where=f"{base}, {a}, {c}")
        group_of = sides[0].group_of
        names = list(dict.fromkeys(name for side in sides for name in side.names))
        excluded = tuple(name for name in names if any(name in side.excluded for side in sides))
        parameters, unmatched = {}, []
        for name in names:
            if name in excluded:
                continue
            present = [label for label, side in zip(("base", "A", "C"), sides, strict=True) if name in side.names]
            if len(present) < 3:
                unmatched.append(f"{name} (only in {' and '.join(present)})")
                continue
            parameters[name] = (group_of(name), _compare(name, [side.tensor(name) for side in sides]))
    if not parameters:
        raise InputError(
            "the three checkpoints have no parameter in common",
            where=f"{base}, {a}, {c}",
            fix="compare one model family",
        )
    return WeightDivergence(parameters, tuple(unmatched), excluded)


def _compare(name: str, tensors: list[Tensor]) -> Sums:
    if tensors[0].dim() == 3:  # experts' matrices stand transposed in published files, and sums do not mind
        turned = (*tensors[0].shape[:1], *tensors[0].shape[:0:-1])
        tensors = [tensor.transpose(-1, -2) if tensor.shape == turned else tensor for tensor in tensors]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise InputError(f"shapes differ: base {shapes[0]}, A {shapes[1]}, C {shapes[2]}", where=name)
    base, a, c = (tensor.reshape(-1) for tensor in tensors)
    parts = []
    for start in range(0, base.numel(), PIECE):
        b, da, dc = (tensor[start : start + PIECE].double() for tensor in (base, a, c))
        da, dc = da - b, dc - b
        parts.append(Sums(b.numel(), *(float(x.dot(y)) for x, y in ((b, b), (da, da), (dc, dc), (da, dc)))))
    sums = _added(parts)
    if not np.isfinite(sums).all():
        raise InputError("weights are NaN or infinite", where=name)
    return sums


def _added(parts: list[Sums]) -> Sums:
    return Sums(*(sum(values) for values in zip(*parts, strict=True))) if parts else Sums(0, 0.0, 0.0, 0.0, 0.0)


# --- gradients ----------------------------------------------------------------------------------------------


def gradient_divergence(
    policy: VLAPolicy,
    questions_from: EpisodeStore,
    actions_from: EpisodeStore,
    *,
    batches: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    memory_gb: float = 2.0,
    progress: Callable[[int], Any] | None = None,
) -> GradientDivergence:
    """Gradients of the language loss (A) and the action loss (C) in the shared backbone, at its present weights.

    questions_from: store that questions are generated from; actions_from: store of demonstrations. Every half-batch
    is drawn anew from the training frames, with replacement, so that halves are independent. The query and the
    head are left out: only the action loss reaches them. The policy is left as it was, to the bit.
    Raises InputError for a batch size below 2 and for a store of another action convention.
    """
    from probes.gradients import gradient_cosines
    from vlm4vla_core.episodes.sampling import action_chunks, split_episodes
    from vlm4vla_core.vqa import questions

    if batch_size < 2:
        raise InputError(f"a batch of {batch_size} has no two halves", fix="use --batch-size 2 or more")
    wrong = policy.config.convention.differences(actions_from.convention)
    if wrong:
        raise InputError(f"the policy's actions mean something else: {'; '.join(wrong)}", where=actions_from.path)
    backbone, config, half_batch = policy.backbone, policy.config, batch_size // 2
    frames = {store.path: split_episodes(store)[0] for store in (questions_from, actions_from)}

    def draw(store: EpisodeStore, objective: int, k: int, half: int) -> tuple[Any, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, objective, k, half])
        rows = rng.choice(frames[store.path], half_batch)
        camera = config.camera if config.camera in store.cameras else store.cameras[0]
        return rng, rows, store.images(camera, rows, backbone.image_size)

    def language(k: int, half: int) -> Tensor:
        rng, rows, images = draw(questions_from, 0, k, half)
        asked = [questions(questions_from, int(row), rng) for row in rows]
        return backbone.language_loss(images, [q.question for q in asked], [q.answer for q in asked])

    def action(k: int, half: int) -> Tensor:
        _, rows, images = draw(actions_from, 1, k, half)
        chunks, mask = action_chunks(actions_from.action, actions_from.episode_of, rows, config.chunk)
        told = [actions_from.instructions[episode] for episode in actions_from.episode_of[rows]]
        return policy(policy.collate(images, told, chunks, mask))["loss"]

    groups = {name: group for name, group in backbone.groups().items() if group != "query"}
    was_training = policy.training
    policy.eval()  # no dropout: noise of the data only
    try:
        return gradient_cosines(
            dict(backbone.named_parameters()), groups, language, action,
            batches=batches, memory_gb=memory_gb, seed=seed, progress=progress,
        )  # fmt: skip
    finally:
        policy.train(was_training)
