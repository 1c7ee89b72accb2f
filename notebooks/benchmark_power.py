# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What can so many models and episodes show?
#
# A correlation over a handful of models is seen only if it is large, and sampling of episodes makes it look smaller
# than it is: a true correlation appears multiplied by the root of the benchmark's reliability. Here stands what a
# design can show before it is paid for. How far true success rates spread, and how much one episode varies, is taken
# from the paper's nine models on one benchmark. Everything is an upper bound: no error of the capability score, no luck
# of training, models as independent draws.

# %% tags=["parameters"]
models = 9
episodes = 96
rho = 0.8
like = "bridge"

# %%
from probes.report.params import BenchmarkPowerParams

params = BenchmarkPowerParams(models=models, episodes=episodes, rho=rho, like=like)

# %%
from probes.figures_power import power_figure
from probes.report import pages
from probes.report.views import benchmark_power as view
from probes.style import TWO_COLUMN

found = view.design(params)
figure, narrow = power_figure(found, width=TWO_COLUMN), power_figure(found)
words = view.figure_words(found)
pages.show(figure, alt=words, narrow=narrow)

# %%
pages.table(view.design_table(found))

# %% [markdown]
# ## Models or episodes?

# %%
pages.table(view.grid_table(found), caption="Power to show the true correlation, by models and episodes of each.")

# %% [markdown]
# ## How much of what the paper's benchmarks show is noise
#
# Reliability is the share of the variance among the nine models' scores that is not sampling of episodes.

# %%
known = view.references()
pages.show(view.reliability_figure(known), alt="Reliability of three benchmarks; the table gives the numbers.")

# %%
pages.table(view.reference_table(known))

# %% [markdown]
# ## The paper's interventions under that noise
#
# Freezing parts of the VLM, training it on action tokens first, and starting from random weights, each against its
# baseline: differences of success from counts that were published (Newcombe's interval, Fisher's exact test), and of
# CALVIN's mean chain length. A printed value that fits no count is flagged; its interval covers both nearest counts.

# %%
from probes import figures_compare, tables

shown = {name: tables.contrasts(name) for name in ("freezing", "injection", "scratch")}
forest = figures_compare.contrast_forest(*shown.values())
pages.show(forest, alt="Every intervention against its baseline: differences with intervals, as in the table below.")

# %%
pages.table(view.contrast_table(shown))

# %% [markdown]
# ## Extra VLM training, three checkpoints each

# %%
extra = tables.auxiliary()
pages.show(
    figures_compare.auxiliary_strip(extra), alt="Three checkpoints of every kind of extra training; see the table."
)

# %%
pages.table(view.auxiliary_table(extra), caption=f"CALVIN, mean tasks in a row. {extra.notes[1].capitalize()}.")

# %%
pages.finish(
    params,
    answer=view.answer(params, found, shown),
    badges=view.badges(shown, extra),
    numbers=view.numbers(found, shown, extra),
    figure=figure,
    narrow=narrow,
    alt=words,
)
