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
# # What did the study ask, how much of it was run, and what does it show?
#
# A study is one file: backbones x arms x training seeds x benchmarks. Cells that were run on this machine are
# told from those whose rows ship with the project, and both from what was not run. A difference counts only where
# the episodes and the training seeds agree on it.

# %% tags=["parameters"]
study = "studies/nano.toml"
level = 0.95

# %%
from probes.report.study_params import StudyOverviewParams

params = StudyOverviewParams(study=study, level=level)

# %%
from probes.report import pages
from probes.report.views import study as shared
from probes.report.views import study_overview as view

study = shared.open_study(params.study)
found = view.every(study, level=params.level)
correlation = view.correlation(study)

# %%
glance = view.glance_figure(study, found)
narrow = view.glance_figure(study, found, columns=1)
bars = view.coverage_figure(study)
narrow_bars = view.coverage_figure(study, width=3.3)

# %%
pages.show(glance, alt=view.glance_words(found), narrow=narrow) if glance else None

# %%
pages.statements(view.at_a_glance(study, found, correlation))

# %% [markdown]
# ## How much of it was run
#
# A cell is one policy in one benchmark. What several questions share counts in each.

# %%
pages.show(bars, alt=view.coverage_words(study), narrow=narrow_bars)

# %%
pages.table(view.coverage(study))

# %% [markdown]
# ## Capability against performance
#
# The capability score is `tabletop-vqa@1`; the performance is the mean over training seeds. The verdicts and what
# they need are those of `vlm4vla correlate` (docs/statistics.md).

# %%
pages.table(view.correlation_table(correlation, study))

# %% [markdown]
# ## Run here although it ships
#
# On the hardware that the rows were made on, both counts are the same; elsewhere rounding makes another training
# of it.

# %%
pages.table(view.live_table(study), caption="Cells that were trained and rolled out on this machine.")

# %%
pages.statements([("Where the study departs from the paper on purpose", " ".join(study.deviations.split()))])

# %%
pages.finish(
    params,
    answer=view.answer(study, found, correlation),
    badges=shared.badges(study, paper=False),
    numbers=view.numbers(study, found, correlation),
    figure=glance or bars,
    alt=view.glance_words(found) if glance else view.coverage_words(study),
    narrow=narrow or narrow_bars,
)
