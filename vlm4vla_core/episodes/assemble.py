"""Parts into a store: repeated episodes out, then the episode table, the statistics and, last, the manifest.

Trap: what is left out here must go the same way however the parts came about, so it depends on their content and
order only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.episodes.frames import LAYERS
from vlm4vla_core.episodes.writer import KIND, MANIFEST, Part, Recipe, write_arrow
from vlm4vla_core.errors import InputError


def repeated(parts: Sequence[Part], splits: Sequence[str]) -> list[set[int]]:
    """Per part the episodes (row numbers) whose content an earlier split has too; splits: each part's own."""
    earlier: set[str] = set()
    here: set[str] = set()
    found = []
    for index, (part, split) in enumerate(zip(parts, splits, strict=True)):
        if index and split != splits[index - 1]:
            earlier |= here
            here = set()
        found.append({place for place, row in enumerate(part.rows) if row["content"] in earlier})
        here |= {row["content"] for row in part.rows}
    return found


def without(folder: Path, part: Part, dropped: Collection[int]) -> Part:
    """The part without some of its episodes. Shards that held one are written anew under another name; the old files
    stay, so that the old part is whole until the new one takes its place."""
    import pyarrow as pa

    shards: list[str] = []
    rows = []
    for number, name in enumerate(part.shards):
        inside = [(place, row) for place, row in enumerate(part.rows) if row["shard"] == number]
        kept = [row for place, row in inside if place not in dropped]
        if len(kept) < len(inside):
            keep = np.repeat([place not in dropped for place, _ in inside], [row["length"] for _, row in inside])
            name = name.replace(".arrow", "-kept.arrow")
            if kept:
                with pa.memory_map(str(folder / part.shards[number])) as source:
                    table = pa.ipc.open_file(source).read_all().filter(pa.array(keep)).combine_chunks()
                    write_arrow(folder / name, table.to_batches()[0])
        if kept:
            rows += [{**row, "shard": len(shards)} for row in kept]
            shards.append(name)
    return replace(part, shards=shards, rows=rows)


def agree(name: str, part: Part, first: str, declared: Mapping[str, Any]) -> None:
    """Raise InputError when a part does not have the cameras, sizes and columns of the first one."""
    for what, value in part.declared.items():
        if part.rows and value != declared[what]:
            fix = (
                "give all one size when converting (`vlm4vla convert --size`)"
                if what == "cameras"
                else "convert them into separate stores"
            )
            raise InputError(f"{what} are {value}, in {first} {declared[what]}", where=name, fix=fix)


def finish(
    folder: Path,
    parts: Sequence[Part],
    recipe: Recipe,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    hashes: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Write tables, statistics and manifest beside the parts' shards, which are then a store.

    hashes: file name -> fingerprint, where it is known already. facts: further values of the manifest; "source"
    is needed. Raises InputError when there are no episodes.
    """
    import pyarrow as pa

    rows = [row for part in parts for row in part.rows]
    if not rows:
        raise InputError("no episodes", where=facts["source"], fix="nothing was written")
    first = next(part for part in parts if part.rows)
    lengths = np.array([row["length"] for row in rows], np.int64)
    columns: dict[str, Any] = {
        "episode": pa.array(np.arange(len(rows), dtype=np.int32)),
        "start": pa.array(np.cumsum(lengths) - lengths),
        "length": pa.array(lengths.astype(np.int32)),
    }
    keys = dict.fromkeys(key for row in rows for key in row if key != "shard" and key not in columns)
    columns |= {key: pa.array([row.get(key, "") for row in rows], pa.string()) for key in keys}
    write_arrow(folder / "episodes.arrow", pa.RecordBatch.from_pydict(columns))
    shards = [name for part in parts for name in part.shards]
    counts = {
        "episodes": len(rows),
        "steps": int(lengths.sum()),
        "instructions": len({row["instruction"] for row in rows}),
    }
    stats = {name: statistics(_column(folder, shards, name)) for name in ("action", "state")}
    folders.write_json(folder / "stats.json", {**stats, "count": counts["steps"], **counts})
    declared = {name: sorted({row[name] for row in rows if row.get(name)}) for name in ("domain", "seed")}
    folders.write_manifest(
        folder,
        KIND,
        name=MANIFEST,
        config=config,
        inputs=inputs,
        known=hashes or {},
        **facts,
        convention=recipe.convention.to_dict(),
        state_names=list(recipe.state_names),
        cameras=first.cameras,
        columns=first.columns,
        **{layer: first.layers.get(layer, {}) for layer in LAYERS},
        domains=declared["domain"],
        seeds=sorted(declared["seed"], key=_number),
        counts=counts,
        shards=shards,
        images={
            "size": recipe.image_size,
            "encoding": recipe.encoding,
            "quality": recipe.quality,
            "colour": "444" if recipe.full_colour else "420",
        },
    )


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (0, text)


def _column(folder: Path, shards: Sequence[str], name: str) -> np.ndarray:
    """(N, D) float32 of all shards."""
    import pyarrow as pa

    parts = []
    for shard in shards:
        with pa.memory_map(str(folder / shard)) as source:
            column = pa.ipc.open_file(source).read_all().column(name).combine_chunks()
            parts.append(np.array(column.flatten()).reshape(len(column), -1))
    return np.concatenate(parts)


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Per-dimension statistics of (N, D) values in float64, as lists of D numbers, and the count N.

    Quantiles interpolate linearly (numpy's default), as in OpenVLA's dataset statistics; std is the population's.
    """
    measures: dict[str, Callable[[np.ndarray], Any]] = {
        "q01": lambda x: np.quantile(x, 0.01),
        "q99": lambda x: np.quantile(x, 0.99),
        "mean": np.mean,
        "std": np.std,
        "min": np.min,
        "max": np.max,
    }
    out: dict[str, Any] = {name: [] for name in measures}
    for dimension in np.asarray(values).T:  # one at a time: float64 of a large set is never held whole
        column = dimension.astype(np.float64)
        for name, measure in measures.items():
            out[name].append(float(measure(column)))
    return out | {"count": len(values)}
