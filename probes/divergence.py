"""Where VLM training and VLA training part: in what they did to the weights, and in which way their gradients pull.

    weight_divergence(base, vlm, vla).to_frame()            # per module group: |A - B|/|B|, |C - B|/|B|, their cosine
    gradient_divergence(policy, asked, shown).to_frame()    # per module group: cosine of the two losses' gradients

A is the VLM-trained checkpoint, C the VLA-trained one, B the base of both. Trap: with millions of parameters a cosine
of 0.01 lies many standard deviations from that of random deltas and may still mean nothing; two runs of the *same*
objective from other seeds are the comparison that counts. The random null is the lower bar, not the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probes.weights import kind_of, network_order, open_three
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probes.gradients import GradientDivergence
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy
    from vlm4vla_core.vqa.files import QuestionFile

PIECE = 1 << 17  # elements at once: what a processor's cache holds, so that reading is what takes the time
CHUNK = 32  # pieces that a thread takes at once


# --- weights ------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What is added up over parameters: their number, |B|², |A - B|², |C - B|² and <A - B, C - B>; moved: how many
    both trainings moved, agreed: how many of these to the same side."""

    n: int
    base: float
    a: float
    c: float
    dot: float
    moved: int = 0
    agreed: int = 0


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
        """One row per module group: group, n_params, rel_norm_a, rel_norm_c, cosine, null_sd, sign_agreement, share_a,
        share_c, share_params.

        rel_norm: |A - B| / |B| (NaN where the base is zero). cosine: between the deltas, NaN when one of them is
        zero. null_sd: standard deviation of that cosine for two independent random deltas, 1 / sqrt(n_params).
        sign_agreement: of the parameters that both moved, the share moved to the same side; chance is 0.5. share:
        the group's part of |A - B|², of |C - B|² and of the parameters.
        """
        return self._frame("group", self.groups)

    def kind_frame(self) -> pd.DataFrame:
        """As `to_frame`, one row per module group and kind ("decoder.3 attention"), in the order of the network."""
        found: dict[tuple[str, str], list[Sums]] = {}
        for name, (group, sums) in self.parameters.items():
            found.setdefault((group, kind_of(name)), []).append(sums)
        order = sorted(found, key=lambda key: (network_order(key[0]), key[1]))
        return self._frame("group", {f"{group} {kind}": _added(found[group, kind]) for group, kind in order})

    def spread(self) -> dict[str, float]:
        """Over how many module groups each change is spread, 1 / sum share²: 1 when all of it is in one group."""
        frame = self.to_frame()
        squares = {side: float(np.square(frame[f"share_{side}"]).sum()) for side in ("a", "c", "params")}
        return {side: 1 / value if value > 0 else float("nan") for side, value in squares.items()}

    def parameter_frame(self) -> pd.DataFrame:
        """As `to_frame`, one row per parameter: parameter, n_params, rel_norm_a, …"""
        return self._frame("parameter", {name: sums for name, (_, sums) in self.parameters.items()})

    def _frame(self, label: str, rows: Mapping[str, Sums]) -> pd.DataFrame:
        import pandas as pd

        total = self.total
        return pd.DataFrame(
            {label: name, **describe(sums), "share_a": _share(sums.a, total.a), "share_c": _share(sums.c, total.c),
             "share_params": sums.n / total.n}
            for name, sums in rows.items()
        )  # fmt: skip


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def describe(sums: Sums) -> dict[str, float]:
    """n_params, rel_norm_a, rel_norm_c, cosine, null_sd and sign_agreement of one sum."""
    with np.errstate(divide="ignore", invalid="ignore"):
        base = np.sqrt(sums.base) if sums.base > 0 else np.nan
        moved = sums.a > 0 and sums.c > 0
        return {
            "n_params": sums.n,
            "rel_norm_a": float(np.sqrt(sums.a) / base),
            "rel_norm_c": float(np.sqrt(sums.c) / base),
            "cosine": float(np.clip(sums.dot / np.sqrt(sums.a * sums.c), -1, 1)) if moved else float("nan"),
            "null_sd": float(1 / np.sqrt(sums.n)),
            "sign_agreement": _share(sums.agreed, sums.moved),
        }


def weight_divergence(
    base: Path | str, a: Path | str, c: Path | str, *, progress: Callable[[int], Any] | None = None
) -> WeightDivergence:
    """Compare two checkpoints with the base both started from, tensor by tensor.

    base, a, c: checkpoint, run or published folders, or single safetensors files. Files are mapped and read piece by
    piece by torch's number of threads, so memory stays flat in the size of the model; pieces are added up in float64.
    progress: called with the number of parameters done. Raises InputError for unreadable files, a shape that differs
    (naming the tensor) and checkpoints without a common parameter.
    """
    parameters = {}
    with open_three(base, a, c) as three, _pool() as pool:
        for name in three.names:
            sums = _compare(name, three.tensors(name), pool)
            parameters[name] = (three.sides[0].group_of(name), sums)
            if progress:
                progress(sums.n)
        return WeightDivergence(parameters, three.unmatched, three.excluded)


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Torch's threads take chunks side by side; within one they would wait for each other at every sum."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, 8)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _compare(name: str, tensors: list[Tensor], pool: ThreadPoolExecutor) -> Sums:
    sums = _added(list(pool.map(_sums, *(tensor.reshape(-1).split(CHUNK * PIECE) for tensor in tensors))))
    if not np.isfinite(sums).all():
        raise InputError("weights are NaN or infinite", where=name)
    return sums


def _sums(base: Tensor, a: Tensor, c: Tensor) -> Sums:
    """Of one chunk (n,) of each, a piece at a time in the same buffers."""
    import torch

    exact = torch.float64 if base.dtype is torch.float64 else torch.float32
    size = min(PIECE, base.numel())
    three, product, mask = torch.empty(3, size, dtype=exact), torch.empty(size, dtype=exact), np.empty(size, bool)
    parts = []
    for pieces in zip(base.split(PIECE), a.split(PIECE), c.split(PIECE), strict=True):
        n = len(pieces[0])
        b, da, dc = three[:, :n]
        for buffer, piece in zip((b, da, dc), pieces, strict=True):
            buffer.copy_(piece)
        three[1:, :n].sub_(b)
        both, told = torch.mul(da, dc, out=product[:n]).numpy(), mask[:n]
        moved, agreed = (int(np.count_nonzero(test(both, 0, out=told))) for test in (np.not_equal, np.greater))
        bb, aa, cc, ac = (float(x.dot(y)) for x, y in ((b, b), (da, da), (dc, dc), (da, dc)))
        parts.append(Sums(n, bb, aa, cc, ac, moved, agreed))
    return _added(parts)


def _added(parts: list[Sums]) -> Sums:
    return Sums(*(sum(values) for values in zip(*parts, strict=True))) if parts else Sums(0, 0.0, 0.0, 0.0, 0.0)


# --- gradients ----------------------------------------------------------------------------------------------


def gradient_divergence(
    policy: VLAPolicy,
    questions_from: EpisodeStore | QuestionFile,
    actions_from: EpisodeStore,
    *,
    batches: int = 16,
    batch_size: int = 16,
    pilots: int = 0,
    fast: bool = False,
    kinds: Sequence[str] = (),
    seed: int = 0,
    memory_gb: float = 2.0,
    progress: Callable[[int], Any] | None = None,
) -> GradientDivergence:
    """Gradients of the language loss (A) and the action loss (C) in the shared backbone, at its present weights.

    questions_from: store that questions (of these kinds) are generated from, or question files; actions_from: store of
    demonstrations (`probes.losses`). pilots: batches for AdamW's second moments. fast: chunks as FAST tokens as a third
    loss (F). The query and the head are left out: only the action loss reaches them. The policy is left as it was, to
    the bit. Raises InputError for a batch size below 2 and for a store of another action convention.
    """
    from probes.gradients import gradient_cosines
    from probes.losses import measuring, policy_losses

    losses = policy_losses(
        policy, questions_from, actions_from, batch_size=batch_size, kinds=kinds, seed=seed, fast=fast
    )
    with measuring(policy):
        return gradient_cosines(
            losses.parameters, losses.groups, losses.language, losses.action, loss_f=losses.fast,
            batches=batches, pilots=pilots, memory_gb=memory_gb, seed=seed, progress=progress,
        )  # fmt: skip
