"""A summary of episodes as one HTML page that needs nothing else: histograms as SVG, pictures inside.

Trap: instructions and names come from the data, so every text is escaped.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape

import numpy as np

from vlm4vla_core import images
from vlm4vla_core.episodes.summary import Dimension, Summary

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4c78a8; --mark: #d1495b; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td, th { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem; }
.card p { margin: .2rem 0 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; } img { max-width: 100%; height: auto; }
.warn li { color: var(--mark); } .quiet { opacity: .75; }
"""


def page(title: str, summary: Summary, sheets: Mapping[str, np.ndarray], scope: str = "", most: int = 40) -> str:
    """The page as text. sheets: camera -> contact sheet, uint8 (H, W, 3). scope: what was looked at, if not all."""
    shortest, median, longest = summary.lengths
    cameras = ", ".join(f"{name} {width}×{height}" for name, (height, width) in summary.cameras.items())
    facts = {
        "source": summary.source,
        "transform": summary.transform,
        "looked at": scope,
        "episodes": f"{summary.episodes} ({', '.join(f'{n} {split}' for split, n in summary.splits.items())})",
        "steps": f"{summary.steps} (per episode {shortest} to {longest}, median {median:g})",
        "cameras": cameras,
        "fingerprint": "" if scope else summary.fingerprint,
    }
    rows = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in facts.items() if text)
    warnings = "".join(f"<li>{escape(text)}</li>" for text in summary.warnings)
    warned = f'<ul class="warn">{warnings}</ul>' if warnings else '<p class="quiet">Nothing looks wrong.</p>'
    told = list(summary.instructions.items())
    spoken = "".join(f'<tr><td class="n">{n}</td><td>{escape(text or "(none)")}</td></tr>' for text, n in told[:most])
    more = f'<p class="quiet">and {len(told) - most} more</p>' if len(told) > most else ""
    shown = "".join(
        f'<h2>Camera {escape(name)}</h2><img alt="Contact sheet of camera {escape(name)}" '
        f'src="data:image/jpeg;base64,{b64encode(images.encode(sheet, full_colour=True)).decode()}">'
        for name, sheet in sheets.items()
    )
    kinds = "".join(
        f'<h2>{kind.capitalize()}</h2><div class="cards">'
        + "".join(_card(dimension) for dimension in summary.dimensions if dimension.kind == kind)
        + "</div>"
        for kind in dict.fromkeys(dimension.kind for dimension in summary.dimensions)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><table>{rows}</table>{warned}{kinds}"
        '<p class="quiet">Red lines: q01 and q99; what lies outside is clipped in training.</p>'
        f"<h2>Instructions ({len(told)})</h2><table>{spoken}</table>{more}{shown}</body></html>\n"
    )


def _card(dimension: Dimension) -> str:
    """Name, histogram with q01 and q99, and the numbers of one dimension."""
    width, height = 240, 70
    peak, bar = max(dimension.histogram), width / len(dimension.histogram)
    bars = "".join(
        f'<rect x="{place * bar:.1f}" y="{height * (1 - n / peak):.1f}" width="{bar - 0.5:.1f}" '
        f'height="{height * n / peak:.1f}" fill="var(--bar)"/>'
        for place, n in enumerate(dimension.histogram)
        if n
    )
    span = dimension.max - dimension.min
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--mark)" stroke-width="1.5"/>'
        for x in (width * (value - dimension.min) / span if span else width / 2 for value in
                  (dimension.q01, dimension.q99))
    )  # fmt: skip
    unit = f" [{escape(dimension.unit)}]" if dimension.unit else ""
    name = escape(dimension.name)
    return (
        f'<div class="card"><strong>{name}</strong>{unit}'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Histogram of {name}">{bars}{marks}</svg>'
        f"<p>{dimension.min:.3g} … {dimension.max:.3g}, mean {dimension.mean:.3g}</p>"
        f"<p>q01 {dimension.q01:.3g}, q99 {dimension.q99:.3g}, outside {dimension.outside:.1%}</p></div>"
    )
