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
# # Do better VLMs make better policies?
#
# Every VLM capability score is correlated with every benchmark over the models that have both. With a handful of models
# the interval decides what may be said: a correlation is *undetermined* unless its interval leaves zero out, its
# permutation p holds up with every pair counted, and no single model turns its sign. Models of one lineage are no
# independent draws, so a correlation that lives between lineages only is called that.

# %% tags=["parameters"]
capability = "data/paper"
performance = "data/paper"
version = "arxiv"
primary = ""
seed = 0

# %%
from probes.report.params import CapabilityVsPerformanceParams

params = CapabilityVsPerformanceParams(
    capability=capability, performance=performance, version=version, primary=primary, seed=seed
)

# %%
from probes.correlation import correlate
from probes.report import pages
from probes.report.views import capability_vs_performance as view

scores, results = view.tables(params)
found = correlate(scores, results, primary=params.primary or None, seed=params.seed)

# %%
from probes.figures import capability_scatter
from probes.style import ONE_COLUMN

figure, narrow = capability_scatter(found), capability_scatter(found, width=ONE_COLUMN)
words = view.figure_words(found)
pages.show(figure, alt=words, narrow=narrow)

# %% [markdown]
# ## What may be said, and why

# %%
pages.statements(view.verdicts(found))

# %% [markdown]
# ## The numbers
#
# p: two-sided permutation test over all arrangements of the models (above ten models, over random ones). p, all pairs:
# the same for the largest |r| of all pairs looked at. p within lineages: only models of one lineage change places.

# %%
pages.table(view.pair_table(found))

# %% [markdown]
# ## What luck of the episodes does to them
#
# Reliability: the share of the variance between models that is not luck of few episodes, an upper bound. Totals,
# shuffled: outcomes change hands between models within each task. Log-odds per SD: a binomial mixed model's slope of
# success on capability, where models differ for other reasons too.

# %%
pages.table(view.noise_table(found))

# %%
pages.finish(
    params,
    answer=view.answer(found),
    badges=view.badges(params, scores, results),
    numbers=found.to_dict(),
    figure=figure,
    narrow=narrow,
    alt=words,
)
