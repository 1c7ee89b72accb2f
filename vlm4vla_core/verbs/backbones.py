"""How large the backbones are, what the adaptation adds to them, and what would be trained.

Without PATH: every published model whose architecture ships with the project. With PATH (a Hugging Face folder or hub
id, a checkpoint or run of this project, or a model's name from the table): that one, part by part. Parameters are
counted from the config alone; no weights are read.

Example: vlm4vla backbones Qwen2.5-VL-3B --freeze vision projector
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.sizes import Size

Part = Literal["vision", "projector", "decoder", "word_embeddings"]


@dataclass(frozen=True)
class Args:
    path: Positional[str | None] = None
    """Model folder, hub id, checkpoint, run, or a model's name from the table; all known models by default."""
    freeze: tuple[Part, ...] = ()
    """Parts that would not be trained. "projector" is the merger, which "vision" does not include."""
    lora: tuple[Part, ...] = ()
    """Parts whose weights would stay, with adapters trained on them."""
    lora_rank: int = 16
    """Rank of the adapters."""
    head: Literal["fc", "mlp", "flow"] = "fc"
    """Policy head."""
    chunk: int = 10
    """Actions per prediction (4 on Bridge and LIBERO in the paper)."""
    json: Path | None = None
    """Also write the table as JSON."""


def run(args: Args) -> int:
    if min(args.lora_rank, args.chunk) < 1:
        raise InputError("--lora-rank and --chunk must be at least 1")
    from vlm4vla_core.families import families
    from vlm4vla_core.sizes import MEMORY_RULE, known_sizes, size_of

    options = {"head": args.head, "chunk": args.chunk, "lora": args.lora, "rank": args.lora_rank}
    sizes = [size_of(args.path, **options)] if args.path else known_sizes(**options)
    if args.path:
        _one(sizes[0], args)
    else:
        _table(sizes, args)
        others = [name for name in families() if name not in {size.family for size in sizes}]
        if others:
            print(f"also supported, without a size in this table: {', '.join(others)}")
    print(f"train GB: {MEMORY_RULE}.")
    if args.json:
        rows = [size.to_dict(args.freeze) for size in sizes]
        folders.write_json(args.json, {"memory_rule": MEMORY_RULE, "families": families(), "sizes": rows})
    return 0


def _frozen(args: Args) -> str:
    words = [f"frozen: {', '.join(args.freeze)}"] if args.freeze else []
    words += [f"adapters of rank {args.lora_rank} on {', '.join(args.lora)}"] if args.lora else []
    return "; ".join(words) or "nothing frozen"


def _table(sizes: list[Size], args: Args) -> None:
    print(f"millions of parameters; head {args.head}, chunk {args.chunk}; {_frozen(args)}")
    head = f"{'model':<17}{'family':<13}{'total':>9}{'vision':>8}{'projector':>11}{'decoder':>9}{'words':>7}{'out':>7}"
    print(head + f"{'new':>8}{'new %':>7}{'trained':>9}{'px':>5}{'tokens':>7}{'train GB':>10}")
    for size in sizes:
        parts = [size.parts[part] / 1e6 for part in ("vision", "projector", "decoder", "word_embeddings")]
        line = f"{size.name:<17}{size.family:<13}{size.total / 1e6:>9.1f}{parts[0]:>8.1f}{parts[1]:>11.1f}"
        line += f"{parts[2]:>9.1f}{parts[3]:>7.1f}{size.lm_head / 1e6:>7.1f}{size.new / 1e6:>8.3f}"
        line += f"{100 * size.new_share:>7.2f}{size.trained(args.freeze) / 1e6:>9.1f}{size.image_size:>5}"
        print(line + f"{size.image_tokens:>7}{size.training_gb(args.freeze):>10.1f}")
    print("out: an untied output layer, counted in total, neither loaded nor trained for actions. new: query and head.")


def _one(size: Size, args: Args) -> None:
    print(f"{size.name}: family {size.family}, {size.total:,} parameters; {_frozen(args)}")
    rows: list[tuple[str, int, str]] = []
    for part, count in size.parts.items():
        fixed = part in args.freeze or part in size.adapters
        rows.append((part, count, "frozen" if fixed else "trained"))
        if part in size.adapters:
            rows.append(("  adapters", size.adapters[part], "trained"))
    rows.append(("query and head", size.new, f"trained, new: {100 * size.new_share:.2g} % of the policy"))
    if size.lm_head:
        rows.append(("output layer", size.lm_head, "untied; not loaded, actions never meet it"))
    for name, count, fate in rows:
        print(f"{name:<16}{count:>16,}  {fate}")
    print(f"{'trained':<16}{size.trained(args.freeze):>16,}  of {size.headless + size.new:,}")
    if size.lm_head:
        print(f"{'  as the paper':<16}{size.trained(args.freeze, output_layer=True):>16,}  with the output layer")
    if size.family.startswith("paligemma") and "word_embeddings" in args.freeze:
        print("VLM4VLA prints 2.7 B for PaliGemma-1 with word embeddings frozen; its own arithmetic gives 2.4.")
    print(f"one picture of {size.image_size} px: {size.image_tokens} tokens")
    values: dict[str, Any] = size.to_dict(args.freeze)
    print(f"memory: {values['training_gb']:.1f} GB to train, {values['inference_gb_bf16']:.1f} GB to infer in bf16")
    if size.source:
        print(f"architecture: {size.source}")
