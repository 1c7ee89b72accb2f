"""FAST: chunks of actions as a few tokens (Pertsch et al. 2025, arXiv 2501.09747), so that a language model can write
them.

Per-dimension quantiles to [-1, 1], cosine transform over time, rounding of scale times the coefficients, written low
frequencies first, byte-pair encoding. Two variants: our own, whose BPE sees a chunk as one string of private-use
characters, and the published byte-level one, whose pre-tokenizer splits that string and needs more tokens.

Trap: not every sequence of tokens is a chunk. `decode` says which were (`ok`); the others become zeros in normalised
units, the middle of the quantile range, which is not "stand still".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.episodes.checks import reason
from vlm4vla_core.episodes.normalise import quantile_denormalise, quantile_normalise
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vlm4vla_core.episodes.store import EpisodeStore

_FORMAT, _VERSION = "vlm4vla-fast", 1
_PRIVATE = 0xE000  # first of Unicode's private-use characters, 6,400 of them
_TOKEN = re.compile(r"<action_(\d+)>")


class Decoded(NamedTuple):
    """actions: (B, T, A) float32; ok: (B,) False where the tokens were no chunk and the actions are zeros."""

    actions: np.ndarray
    ok: np.ndarray

    @property
    def failed(self) -> int:
        """How many sequences were no chunk."""
        return int((~self.ok).sum())


@dataclass(frozen=True, eq=False)
class FastTokenizer:
    """Turns chunks (horizon, width) of actions into tokens 0 … vocab_size - 1 and back.

    q01, q99: per dimension, gripper included; None when actions come already normalised. A coefficient c is the
    character first + c - lowest; coefficients are clipped to lowest … highest.
    """

    horizon: int
    width: int
    scale: float
    lowest: int
    highest: int
    first: int
    q01: tuple[float, ...] | None
    q99: tuple[float, ...] | None
    bpe: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    @property
    def error_bound(self) -> float:
        """Largest error of any decoded number, in normalised units, of actions within the quantiles.

        Each of T coefficients is off by at most 0.5 / scale and the transform is orthonormal: 0.5 / scale * sqrt(T).
        It holds always for our own variant, whose alphabet has every coefficient there can be.
        """
        return 0.5 / self.scale * self.horizon**0.5

    def coefficients(self, actions: np.ndarray) -> np.ndarray:
        """Rounded cosine coefficients, integers (B, T, A), of actions (B, T, A). Raises ValueError on shape or NaN."""
        from scipy.fft import dct

        actions = np.asarray(actions)
        if actions.shape[1:] != (self.horizon, self.width) or not np.isfinite(actions).all():
            raise ValueError(f"expected finite actions (B, {self.horizon}, {self.width}), got shape {actions.shape}")
        if self.q01 is not None and self.q99 is not None:
            actions = quantile_normalise(actions, np.array(self.q01), np.array(self.q99), keep=0)
        rounded = np.around(dct(actions.astype(np.float64), axis=1, norm="ortho") * self.scale)  # (B, T, A)
        return np.clip(rounded, self.lowest, self.highest).astype(np.int64)

    def encode(self, actions: np.ndarray) -> list[list[int]]:
        """Tokens of chunks (B, T, A), or of one chunk (T, A) as a batch of one. Raises ValueError as `coefficients`."""
        actions = np.asarray(actions)
        found = self.coefficients(actions[None] if actions.ndim == 2 else actions)
        return [encoded.ids for encoded in self.bpe.encode_batch(self._strings(found), add_special_tokens=False)]

    def decode(self, tokens: Iterable[Sequence[int]]) -> Decoded:
        """The chunks that these token sequences stand for. What is no chunk (length, unknown token) gets ok False."""
        from scipy.fft import idct

        found = [self._read(list(ids)) for ids in tokens]
        empty = np.zeros((self.horizon, self.width))
        values = np.array([empty if one is None else one for one in found]).reshape(-1, self.horizon, self.width)
        actions = idct(values / self.scale, axis=1, norm="ortho").astype(np.float32)
        if self.q01 is not None and self.q99 is not None:
            actions = quantile_denormalise(actions, np.array(self.q01), np.array(self.q99), keep=0)
        return Decoded(actions, np.array([one is not None for one in found], bool))

    def _strings(self, coefficients: np.ndarray) -> list[str]:
        codes = coefficients.reshape(len(coefficients), -1) + (self.first - self.lowest)
        return ["".join(map(chr, row)) for row in codes.tolist()]

    def _read(self, ids: list[int]) -> np.ndarray | None:
        if any(not 0 <= token < self.vocab_size for token in ids):
            return None
        text = self.bpe.decode(ids, skip_special_tokens=False)
        values = np.fromiter(map(ord, text), np.int64, len(text)) + (self.lowest - self.first)
        if len(values) != self.horizon * self.width or values.min() < self.lowest or values.max() > self.highest:
            return None
        return values.reshape(self.horizon, self.width)

    # --- as a file

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, for a checkpoint's configuration."""
        numbers = {name: getattr(self, name) for name in _FIELDS}
        return {"format": _FORMAT, "version": _VERSION, **numbers, "bpe": json.loads(self.bpe.to_str())}

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, where: object = "") -> FastTokenizer:
        """The way back of `to_dict`. Raises InputError on another format, a newer version or damage."""
        from tokenizers import Tokenizer

        try:
            if value["format"] != _FORMAT or value["version"] > _VERSION:
                what = f"{value['format']} version {value['version']} is no FAST tokenizer of version {_VERSION}"
                raise InputError(what, where=where, fix="update vlm4vla, or fit it again")
            numbers: dict[str, Any] = {
                name: tuple(value[name]) if isinstance(value[name], list) else value[name] for name in _FIELDS
            }
            return cls(**numbers, bpe=Tokenizer.from_str(json.dumps(value["bpe"])))
        except InputError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"damaged FAST tokenizer ({reason(error)})", where=where, fix="fit it again") from None

    def save(self, path: Path) -> None:
        """Write one JSON file, whole or not at all."""
        folders.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> FastTokenizer:
        """Read what `save` wrote. Raises InputError when it is missing, damaged or newer."""
        return cls.from_dict(folders.read_json(path, fix="fit it again"), where=path)


_FIELDS = ("horizon", "width", "scale", "lowest", "highest", "first", "q01", "q99")


def as_text(tokens: Iterable[int]) -> str:
    """Tokens as names, `<action_12><action_7>`, which a vocabulary can hold or map."""
    return "".join(f"<action_{token}>" for token in tokens)


def from_text(text: str) -> list[int]:
    """The tokens named in a text, in order; anything between them is passed over."""
    return [int(number) for number in _TOKEN.findall(text)]


# --- fitting


def fit(
    chunks: np.ndarray, q01: Sequence[float], q99: Sequence[float], *, scale: float = 10, vocab_size: int = 1024
) -> FastTokenizer:
    """Our own variant, fitted to chunks (N, T, A) in physical units; a function of its arguments alone.

    q01, q99: (A,) per dimension, such as a store's statistics. The alphabet holds every coefficient that a chunk within
    the quantiles can have (scale * sqrt(T) either way), seen or not. Raises InputError when it does not fit into
    `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, trainers

    count, horizon, width = np.shape(chunks)
    reach = round(scale * horizon**0.5)
    if not count or 2 * reach + 1 > min(vocab_size, 6400):
        what = f"{2 * reach + 1} different coefficients and {count} chunks for a vocabulary of {vocab_size}"
        raise InputError(what, where=f"scale {scale:g}, {horizon} steps", fix="use a smaller scale or more tokens")
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.Fuse()
    low, high = (tuple(float(number) for number in quantile) for quantile in (q01, q99))
    made = FastTokenizer(horizon, width, scale, -reach, reach, _PRIVATE, low, high, bpe)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=[chr(_PRIVATE + index) for index in range(2 * reach + 1)],
        max_token_length=10_000,
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(made._strings(made.coefficients(chunks)), trainer)
    return made


def fit_store(
    store: EpisodeStore, horizon: int, *, rows: np.ndarray | None = None, scale: float = 10, vocab_size: int = 1024
) -> FastTokenizer:
    """`fit` on a store's chunks and quantiles; rows: where they begin (default: up to 20,000, evenly spread)."""
    from vlm4vla_core.episodes.sampling import action_chunks

    if rows is None:
        rows = np.unique(np.linspace(0, len(store) - 1, 20_000).astype(int))
    chunks, _ = action_chunks(store.action, store.episode_of, rows, horizon)
    stats = store.stats["action"]
    return fit(chunks, stats["q01"], stats["q99"], scale=scale, vocab_size=vocab_size)


def published(
    folder: Path,
    *,
    horizon: int | None = None,
    width: int | None = None,
    q01: Sequence[float] | None = None,
    q99: Sequence[float] | None = None,
) -> FastTokenizer:
    """A tokenizer in the published layout (`processor_config.json` beside a byte-level `tokenizer.json`); no code is
    run.

    horizon, width: of a chunk, where the configuration leaves them open. q01, q99: when given, actions are in physical
    units, else they are normalised to [-1, 1] already, as the published code expects. Tokens equal those of the
    published code; of what decodes to no chunk we give zeros too, also where that one reads nonsense.
    Raises InputError on missing or damaged files, open shapes and shapes that contradict the configuration.
    """
    from tokenizers import Tokenizer

    path = folder / "processor_config.json"
    config = folders.read_json(path, fix="give the folder of a published FAST tokenizer")
    shape: list[int] = []
    for key, given in (("time_horizon", horizon), ("action_dim", width)):
        value = config.get(key) if isinstance(config, dict) else None
        if value is not None and given not in (None, value):
            raise InputError(f"{key} is {value}, not {given}", where=path, fix="use the tokenizer's own chunk")
        if given is None and not isinstance(value, int):
            raise InputError(f"the configuration leaves {key} open", where=path, fix="give horizon and width")
        shape.append(int(value or given or 0))
    nested = folder / "bpe_tokenizer" / "tokenizer.json"
    file = nested if nested.exists() else folder / "tokenizer.json"
    try:
        scale, lowest = float(config["scale"]), int(config["min_token"])
        bpe = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"no published FAST tokenizer ({reason(error)})", where=folder, fix="fetch it again") from None
    low, high = (None if quantile is None else tuple(map(float, quantile)) for quantile in (q01, q99))
    highest = lowest + 0xD7FF  # the last character before the surrogates; the byte level can write any of them
    return FastTokenizer(shape[0], shape[1], scale, lowest, highest, 0, low, high, bpe)
