"""A notebook of a few cells, with a parameter model of its own, written where a test wants it."""

from __future__ import annotations

from pathlib import Path

MODEL = """
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from probes.report.params import Input, NotebookParams


class SmallParams(NotebookParams):
    notebook: ClassVar[str] = "small"
    table: Annotated[Path, Input(made_by="vlm4vla evaluate"), Field(description="a CSV table")]
    factor: Annotated[float, Field(gt=0, description="multiplies the values")]
    label: str
    seed: int
"""

NOTEBOOK = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # How large is the sum?
#
# A *small* notebook with a [link](https://example.org).
# %% tags=["parameters"]
table = "table.csv"
factor = 2.0
label = "sum <of> y"
seed = 3
# %%
from small_params import SmallParams

params = SmallParams(table=table, factor=factor, label=label, seed=seed)
# %%
import pandas as pd

from probes.report import pages
from probes.style import figure_style, new_figure

frame = pd.read_csv(params.table)
pages.table(frame, caption="What is summed")
# %%
with figure_style():
    fig, axes = new_figure(width=7.2)
    axes[0, 0].plot(frame["x"], frame["y"] * params.factor)
pages.show(fig, alt="The values against x.")
# %%
print("checked", frame["y"].sum())
frame.assign(**{f"column_{i}": 1000 * i for i in range(15)})
# %%
total = frame["y"].sum() * params.factor
pages.finish(
    params, answer=f"The {params.label} is {total:g}.", badges=["measured", "published: exact"],
    numbers={"total": total}, figure=fig, alt="The values against x.",
);
"""

TABLE = "x,y\n1,2\n3,4.5\n5,-1.25\n"


def write_small(folder: Path, *, last: str = "") -> Path:
    """small.ipynb, its parameter model and its table in `folder`; `last` is code put before the final cell."""
    import jupytext

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small_params.py").write_text(MODEL)
    (folder / "table.csv").write_text(TABLE)
    source = NOTEBOOK.replace("# %%\ntotal", f"# %%\n{last}\n# %%\ntotal") if last else NOTEBOOK
    jupytext.write(jupytext.reads(source, fmt="py:percent"), folder / "small.ipynb")
    return folder / "small.ipynb"
