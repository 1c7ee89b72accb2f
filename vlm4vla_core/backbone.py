"""A VLM as the trunk of a policy: the unmodified headless model plus one learned vector, the action query.

A reserved token stands in the prompt; a forward hook on the input embedding puts the query there, in fp32 and out
of place. The model's own `forward` then splices the image, builds masks and multimodal positions and returns hidden
states; no logits are ever computed for actions. Images travel as uint8 and are normalised and cut on the device.

Trap: passing embeddings instead of token ids runs in every family and is silently wrong in six of thirteen (no
multimodal positions). Ids always go in; `check_backbone` proves the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.families import FamilySpec, Geometry, family
from vlm4vla_core.image_tokens import given
from vlm4vla_core.options import BackboneOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEXT_TOKENS = 512
MAX_LAYOUTS = 4096  # of text, image and padding, whose positions are remembered
IGNORE = -100
PARTS = ("vision", "projector", "decoder")


class Backbone(nn.Module):
    """A headless VLM, its tokenizer and the action query.

    base: what `AutoModel` gives. image_size: pixels per side of the square images that go in (geometry.size: of what
    the model sees, after `options.upscale`). query: (n_queries, D) fp32. padding: "right" (default) or "left"; the
    query stands right after the last real token either way, unless the options say otherwise.
    lm_head: (V, D) output layer of an untied model, when it was loaded. dense: heads on image tokens, when it was
    trained with them (`dense_heads`). lineage: where the weights come from.
    """

    base: Any
    spec: FamilySpec
    lm_head: nn.Parameter | None
    dense: Any

    def __init__(
        self,
        base: Any,
        tokenizer: PreTrainedTokenizerBase,
        spec: FamilySpec,
        image_size: int | None = None,
        *,
        options: BackboneOptions | None = None,
        seed: int = 0,
        padding: str = "right",
        lm_head: Tensor | None = None,
        lineage: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base, self.tokenizer, self.spec, self.padding = base, tokenizer, spec, padding
        self.options = options = options or BackboneOptions()
        self.image_size: int = image_size or options.image_size or spec.native_size(base.config)
        seen = self.image_size * (spec.upscale if options.upscale else 1)
        self.geometry: Geometry = spec.geometry(base.config, seen)
        self.prompt = spec.prompts[options.prompt]
        self.lineage = dict(lineage or {})
        self.image_id, self.query_id, self.end_id = (
            _token_id(tokenizer, token) for token in (spec.image_token, spec.query_token, spec.answer_end)
        )
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id)
        listed = {tokenizer.get_vocab().get(token) for token in spec.special_tokens}  # some are not flagged special
        self.reserved = {*tokenizer.all_special_ids, *listed} - {None}
        words = base.get_submodule(spec.embeddings)
        if self.query_id >= words.num_embeddings:
            raise InputError(
                f"the query token's id {self.query_id} lies outside the {words.num_embeddings} word rows",
                fix="use the tokenizer that belongs to the model",
            )
        own_pad = getattr(base.config.get_text_config(), "pad_token_id", None)
        if self.query_id == self.pad_id or (spec.positions == "ids" and self.pad_id != own_pad):
            raise InputError(
                f"the tokenizer pads with id {self.pad_id}, the model with {own_pad}",
                fix="use the tokenizer that belongs to the model",
            )
        # As long as a typical word, so that the first layer's norm sees nothing unusual; drawn apart from all else.
        scale = words.weight.detach().float().pow(2).mean().sqrt().cpu() * self.embed_scale
        noise = torch.randn(
            options.n_queries, words.embedding_dim, generator=torch.Generator().manual_seed(seed + 7919)
        )
        self.query = nn.Parameter((noise * (scale if options.query_init == "scaled" else 0)).to(words.weight.device))
        self.lm_head = None if lm_head is None else nn.Parameter(lm_head)
        self.register_module("dense", None)
        words.register_forward_hook(self._put_query)
        if not options.dropout:
            _switch_off_dropout(base)
        self._encode = lru_cache(maxsize=4096)(self._encode_text)
        self._positions: dict[bytes, Tensor] = {}

    @property
    def embed_scale(self) -> float:
        """What the word embedding layer multiplies its rows by, and the hook's query is not."""
        if self.spec.embed_scale != "inside":
            return 1.0
        return float(self.base.get_submodule(self.spec.embeddings).embedding_dim ** 0.5)

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return int(self.query.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.query.device

    def _put_query(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        ids = args[0]
        if ids.dim() != 2:  # look-ups of a single placeholder id pass here too
            return out
        hit = ids == self.query_id
        number = (hit.cumsum(1) - 1).clamp(0, len(self.query) - 1)
        return torch.where(hit[..., None], self.query.to(out.dtype)[number], out)  # (B, L, D)

    # --- from images and text to a batch

    def _encode_text(self, text: str, question: str, first: bool = True) -> tuple[int, ...]:
        """Token ids of the prompt that asks `question` (a format) about `text`; without picture when it is not the
        first question about it. Raises InputError on bad text."""
        if not text.strip():
            raise InputError("empty instruction", fix="every image needs a text")
        own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if reserved := sorted(set(own) & self.reserved):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(reserved))
            raise InputError(f"the text contains reserved tokens ({names})", where=text[:80], fix="remove them")
        if len(own) > MAX_TEXT_TOKENS:
            raise InputError(f"a text of {len(own)} tokens, at most {MAX_TEXT_TOKENS} are allowed", where=text[:80])
        image = self.spec.image_token * self.geometry.tokens
        prompt = self.prompt.text.replace("{image}", image) if first else self.spec.turn
        prompt = prompt.replace("{text}", question.replace("{instruction}", text))
        return tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def collate(self, images: np.ndarray, texts: Sequence[str], *, query: bool = True) -> dict[str, Tensor]:
        """Make a batch on the CPU from uint8 images (B, H, W, 3) and B texts.

        query=True: the texts are instructions, put into the family's action question and followed by the query.
        query=False: the texts are asked as they are, without a query. Images of another size are resized.
        Returns input_ids, attention_mask, position_ids, images and the family's extra inputs.
        Raises InputError on wrong images, on counts that differ, and on empty, overlong or reserved texts.
        """
        question = self.prompt.question if query else "{instruction}"
        return self._batch(images, [list(self._encode(text, question)) for text in texts], query=query)

    def collate_answers(
        self, images: np.ndarray, questions: Sequence[str], answers: Sequence[str | Sequence[int]]
    ) -> dict[str, Tensor]:
        """As `collate`, with each answer (a text, or word ids) appended; `labels` (B, L): IGNORE outside answers."""
        if len(questions) != len(answers):
            raise InputError(f"{len(questions)} questions but {len(answers)} answers")
        return self.collate_turns(images, [[turn] for turn in zip(questions, answers, strict=True)])

    def collate_turns(
        self, images: np.ndarray, turns: Sequence[Sequence[tuple[str, str | Sequence[int]]]]
    ) -> dict[str, Tensor]:
        """As `collate_answers`, with several questions and answers about each picture, one after the other.

        The first is asked as it is alone, and answered with the same logits: what follows is read in one direction in
        every family, so that of PaliGemma's prefix only picture and first question are read in both.
        """
        rows, labels, starts = [], [], []
        for asked in turns:
            row: list[int] = []
            label: list[int] = []
            for number, (question, answer) in enumerate(asked):
                prompt, text = list(self._encode(question, "{instruction}", number == 0)), isinstance(answer, str)
                words = self.tokenizer(answer, add_special_tokens=False)["input_ids"] if text else answer
                tail = [*words, self.end_id]
                if number == 0:
                    starts.append(len(prompt))
                row += prompt + tail
                label += [IGNORE] * len(prompt) + tail
            rows.append(row)
            labels.append(label)
        batch = self._batch(images, rows, starts=starts)
        batch["labels"] = self._pad(labels, IGNORE)
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        width = max(map(len, rows))
        out = torch.full((len(rows), width), value)
        for index, row in enumerate(rows):
            start = width - len(row) if self.padding == "left" else 0
            out[index, start : start + len(row)] = torch.tensor(row)
        return out

    def _batch(
        self, images: np.ndarray, rows: list[list[int]], *, query: bool = False, starts: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Pad and add what the family needs. query: append the action query. starts: where each row's suffix begins."""
        if len(images) != len(rows) or not rows:
            raise InputError(f"{len(images)} images for {len(rows)} texts", fix="give one image for each text")
        pixels = self.pictures(images)
        tail = [self.query_id] * len(self.query) if query else []
        early = tail if self.options.query_place == "before_pads" else []
        parts = [[*row, *early] for row in rows]
        ends = [len(row) if starts is None else starts[index] for index, row in enumerate(rows)]
        ids = self._pad(parts, self.pad_id)
        mask = self._pad([[1] * len(row) for row in parts], 0)
        suffix = self._pad([[0] * end + [1] * (len(row) - end) for row, end in zip(parts, ends, strict=True)], 0)
        if tail and not early:
            late = torch.tensor(tail).expand(len(rows), -1)
            ids, mask, suffix = (torch.cat(pair, 1) for pair in ((ids, late), (mask, late > -1), (suffix, late > -1)))
        if query and self.options.query_role == "prefix":
            suffix = torch.zeros_like(suffix)
        image = ids == self.image_id
        if self.spec.image_ids:
            ids[image] = torch.tensor(self.spec.image_ids(self.tokenizer, self.geometry.tokens) * len(rows))
        batch = {"input_ids": ids, "attention_mask": mask, **self.spec.token_inputs(image, suffix.bool())}
        batch |= self._position_ids(batch)
        batch["images"] = pixels
        return batch

    def pictures(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, 3) at the size that the model sees, on the CPU. Raises InputError on what is no picture."""
        from vlm4vla_core import images as resizing

        try:
            pixels = resizing.resize(np.asarray(images), self.image_size)
        except ValueError as error:
            raise InputError(str(error)) from None
        pixels = resizing.resize(pixels, self.geometry.size)  # in two steps, as the authors' processors
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def _position_ids(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positions (B, L), or (3, B, L) for multimodal ones; nothing where the model counts ids by itself."""
        kind, plain = self.spec.positions, self.options.positions == "arange"
        mask = batch["attention_mask"]
        count = (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        if plain and self.spec.plain_pads:
            count = torch.arange(mask.shape[1]).expand_as(mask)
        if kind == "mrope":
            return {"position_ids": count.expand(3, -1, -1) if plain else self._rope_index(batch)}
        if kind == "ids":
            return {"position_ids": count + self.pad_id + 1} if plain else {}
        return {"position_ids": count + (kind == "count1")}

    def _rope_index(self, batch: dict[str, Tensor]) -> Tensor:
        """Multimodal positions (3, B, L) from the model's own rule, once per layout of text, image and padding.

        The rule loops over the batch with host synchronisation, so it runs here and never inside `forward`.
        """
        rows = []
        for index, (types, mask) in enumerate(zip(batch["mm_token_type_ids"], batch["attention_mask"], strict=True)):
            key = types.numpy().tobytes() + mask.numpy().tobytes()
            positions = self._positions.get(key)
            if positions is None:
                if len(self._positions) >= MAX_LAYOUTS:
                    self._positions.clear()
                one = slice(index, index + 1)
                positions = self._positions[key] = self.base.get_rope_index(
                    batch["input_ids"][one],
                    mm_token_type_ids=batch["mm_token_type_ids"][one],
                    image_grid_thw=torch.tensor([[1, self.geometry.grid, self.geometry.grid]]),
                    attention_mask=batch["attention_mask"][one],
                )[0]  # (3, 1, L)
            rows.append(positions)
        return torch.cat(rows, dim=1)

    # --- forward

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, H, W, 3) on any device -> the family's normalised and cut pixel inputs, in the base's dtype."""
        mean = torch.tensor(self.spec.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.spec.std, device=images.device).view(1, 3, 1, 1)
        x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std  # (B, 3, H, W)
        return self.spec.pixel_inputs(x.to(self.base.dtype), self.geometry)

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states (B, L, D) of a collated batch, after the last norm.

        "tokens" in the batch, of `image_tokens`, stand for the pictures. Raises ValueError when an input is missing
        that the family would silently do without.
        """
        positions = () if self.spec.positions == "ids" else ("position_ids",)
        needed = ("input_ids", "attention_mask", *positions, *self.spec.extra_inputs)
        if missing := [name for name in needed if name not in batch]:
            raise ValueError(f"{self.spec.name} needs {', '.join(missing)} in the batch and would be wrong without")
        inputs = {name: batch[name].to(self.device) for name in batch if name not in ("images", "labels", "tokens")}
        if "tokens" in batch:
            inputs["pixel_values"] = batch["tokens"]
            with given(self, batch["tokens"]):
                return self.base(**inputs, use_cache=False).last_hidden_state
        if "pixel_values" not in inputs:
            inputs |= self.pixels(batch["images"].to(self.device))
        return self.base(**inputs, use_cache=False).last_hidden_state

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states at the action queries: (B, n_queries, D), in the base's dtype."""
        hit = batch["input_ids"] == self.query_id  # (B, L), compared on the CPU: no host synchronisation
        if not bool((hit.sum(1) == len(self.query)).all()):
            raise ValueError(f"every prompt must hold {len(self.query)} action queries; collate with query=True")
        where = hit.nonzero(as_tuple=True)
        states = self.hidden(batch)
        return states[where[0].to(states.device), where[1].to(states.device)].view(len(hit), len(self.query), -1)

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input in training mode and compute the rest again: the same gradients, less memory."""
        enable = getattr(self.base, "activation_checkpointing_enable", None)  # its name before: gradient_checkpointing
        (enable or self.base.gradient_checkpointing_enable)({"use_reentrant": False})
        if not any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            raise ValueError(f"{self.spec.name} has no gradient checkpointing")

    def answer_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, V) that predict the n answer tokens of a batch from `collate_answers`, and those tokens (n,).

        Only these positions meet the output layer. Raises InputError when it is untied and was not loaded.
        """
        weight = self.base.get_submodule(self.spec.embeddings).weight if self.lm_head is None else self.lm_head
        if self.lm_head is None and not self.base.config.tie_word_embeddings:
            raise InputError(
                "this model's output layer is not tied to its word embeddings and was not loaded",
                fix="load_backbone(path, language_head=True), or tiny(family, language_head=True)",
            )
        row, column = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        states = self.hidden(batch)
        picked = states[row.to(states.device), column.to(states.device) - 1]  # the token before predicts
        logits = picked.float() @ weight.float().T
        if cap := getattr(self.base.config.get_text_config(), "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap  # Gemma 2
        return logits, batch["labels"][row, column].to(states.device)

    def language_loss(self, images: np.ndarray, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Next-token loss on the answers: a scalar, mean cross-entropy (nats) over all answer tokens."""
        logits, targets = self.answer_logits(self.collate_answers(images, questions, answers))
        return nn.functional.cross_entropy(logits, targets)

    # --- what probes look at

    def vision_features(self, images: np.ndarray | Tensor) -> dict[str, Tensor]:
        """Features of the vision tower, in raster order, in the base's dtype; gradients flow unless switched off.

        images: uint8 (B, H, W, 3). Returns "vision.0"… (B, grid², C), the output of each block, and "projector"
        (B, tokens, D), the image tokens that the decoder reads (LLaVA-OneVision: those of the whole image; Kosmos-2:
        latents, which lie on no grid).
        """
        if isinstance(images, np.ndarray):
            images = self.pictures(images)
        blocks = self.base.get_submodule(self.spec.blocks)
        taps = {f"vision.{index}": block for index, block in enumerate(blocks)}
        taps["projector"] = self.base.get_submodule(self.spec.projector[0])
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                seen[name] = out[0] if isinstance(out, tuple) else out

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in taps.items()]
        try:
            self.base.get_image_features(**self.pixels(images.to(self.device)))
        finally:
            for handle in handles:
                handle.remove()
        out = {}
        for name in taps:
            flat = seen[name].reshape(len(images), -1, seen[name].shape[-1])  # (B, n, C)
            out[name] = self.spec.raster(flat, self.geometry, name == "projector")
        return out

    def groups(self) -> dict[str, str]:
        """Parameter name -> module group: "vision.embed", "vision.0"…, "projector", "embeddings", "decoder.0"…,
        "decoder.norm", "lm_head", "query", "dense". Every parameter of this module is in exactly one group."""
        found = {
            name: "dense" if name.startswith("dense.") else self.spec.group_of(name.removeprefix("base."))
            for name, _ in self.named_parameters()
        }
        found["query"] = "query"
        if lost := [name for name, group in found.items() if group is None]:
            raise ValueError(f"parameter {lost[0]} belongs to no module group of {self.spec.name}")
        return {name: str(group) for name, group in found.items()}

    # --- saving

    def describe(self) -> dict[str, Any]:
        """What is needed, besides weights and tokenizer, to build this backbone again (JSON values)."""
        config = self.base.config.to_dict()
        config.pop("_name_or_path", None)  # a machine's path
        config.pop("transformers_version", None)
        return {
            "family": self.spec.name,
            "image_size": self.image_size,
            "options": self.options.to_dict(),
            "n_queries": len(self.query),
            "padding": self.padding,
            "untied_head": self.lm_head is not None,
            **({"dense": self.dense.settings} if self.dense is not None else {}),
            "dtype": str(next(self.base.parameters()).dtype).removeprefix("torch."),
            "attention": _attention(self.base.config),
            "lineage": self.lineage,
            "model": config,
        }

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder of this backbone alone (see `vlm4vla_core.checkpoint`)."""
        from vlm4vla_core import checkpoint

        checkpoint.save(Path(folder), self)

    @staticmethod
    def load(folder: Path, device: str = "cpu") -> Backbone:
        """Read the backbone of a checkpoint or run folder, of a policy too. Raises InputError as `checkpoint.load`."""
        from vlm4vla_core import checkpoint

        return checkpoint.load_backbone(Path(folder), device)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index: Any = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise InputError(f"the tokenizer has no token '{token}'", fix="use the tokenizer that belongs to the model")
    return int(index)


def _attention(config: Any) -> str | dict[str, str]:
    """The attention implementations in use: one name, or one per part where they differ."""
    parts = {name: getattr(config, name, None) for name in ("text_config", "vision_config")}
    names = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return names if len(set(names.values())) > 1 else str(config._attn_implementation)


def _switch_off_dropout(base: nn.Module) -> None:
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# --- making backbones -----------------------------------------------------------------------------------


def tiny(
    name: str = "qwen2_5_vl",
    *,
    seed: int = 0,
    image_size: int = 112,
    language_head: bool = False,
    options: BackboneOptions | None = None,
) -> Backbone:
    """A tiny, randomly initialised member of a family's real class, with an offline tokenizer, on the CPU in fp32.

    The same seed gives the same weights; torch's global random state is left alone. language_head: also draw the output
    layer where it is not tied, for `language_loss`. Raises InputError on an unknown family.
    """
    from vlm4vla_core.tiny import tiny_base, tiny_tokenizer

    spec = family(name)
    tokenizer = tiny_tokenizer(spec)
    lineage = {"source": f"tiny {name}", "init": "scratch", "init_seed": seed}
    seen = image_size * (spec.upscale if options and options.upscale else 1)
    base, head = tiny_base(spec, tokenizer, seed, seen)
    head = head if language_head else None
    return Backbone(base, tokenizer, spec, image_size, options=options, seed=seed, lm_head=head, lineage=lineage).eval()


def load_backbone(
    path: str | Path,
    *,
    init: str = "pretrained",
    scratch: Sequence[str] = PARTS,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    attn: str | None = None,
    image_size: int | None = None,
    language_head: bool = False,
    options: BackboneOptions | None = None,
) -> Backbone:
    """Load a VLM as a backbone: a Hugging Face folder or hub id, or a checkpoint or run folder of this project.

    init: "pretrained", or "scratch" to draw weights anew by the library's default, from `seed` (recorded). scratch:
    what is drawn anew, of "vision", "projector" and "decoder" (word embeddings and output layer included); the rest
    stays as pretrained. dtype: of the base; fp32 (master weights), or the checkpoint's, when left out. attn: attention
    implementation; the family's choice, or the checkpoint's, when left out. image_size: pixels per side; the model's
    own (or the checkpoint's) when left out. language_head: also load an untied output layer of a Hugging Face model,
    for `language_loss`; a checkpoint of this project has it or has it not. options: how the query enters; a checkpoint
    of this project keeps its own.
    Raises InputError when the path cannot be had (offline, gated, missing shard), the family is unknown, a weight is
    missing or left over, or a weight is not finite.
    """
    from vlm4vla_core import checkpoint
    from vlm4vla_core.hub import read_base

    if init not in ("pretrained", "scratch"):
        raise InputError(f"unknown init '{init}'", fix="use 'pretrained' or 'scratch'")
    scratch = (scratch,) if isinstance(scratch, str) else scratch
    if init == "scratch" and not scratch:
        raise InputError("init='scratch' with no part to draw anew", fix="name some of vision, projector, decoder")
    if unknown := sorted(set(scratch) - set(PARTS)):
        raise InputError(f"unknown part '{unknown[0]}' to draw anew", fix=nearest(unknown[0], PARTS))
    own, parts = checkpoint.looks_like_one(Path(path)), sorted(set(scratch))
    if own and options is not None:
        raise InputError("a checkpoint of this project keeps its own options", where=path, fix="leave options out")

    def read(init: str) -> Backbone:
        if own:
            return checkpoint.reload(Path(path), init=init, seed=seed, dtype=dtype, attn=attn, image_size=image_size)
        base, tokenizer, spec, head = read_base(
            str(path), init=init, seed=seed, dtype=dtype, attn=attn, language_head=language_head
        )
        lineage = {"source": Path(path).name, "init": init, "init_seed": seed if init == "scratch" else None}
        made = Backbone(base, tokenizer, spec, image_size, options=options, seed=seed, lm_head=head, lineage=lineage)
        return made.eval()

    if init == "pretrained" or len(parts) == len(PARTS):
        return read(init)
    model, fresh = read("pretrained"), read("scratch").state_dict()
    with torch.no_grad():
        for name, group in model.groups().items():
            part = "decoder" if group in ("embeddings", "lm_head") else group.split(".")[0]
            if part in parts:
                model.get_parameter(name).copy_(fresh[name])
    model.lineage |= {"init": f"scratch {' '.join(parts)}", "init_seed": seed}
    return model
