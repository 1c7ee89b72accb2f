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
# # How alike are the representations of two checkpoints?
#
# Both have seen the same frames. Debiased centred kernel alignment (CKA): 1 is the same up to rotation and scale, 0
# unrelated; a value in brackets does not rise above what shuffled images give. Intervals are over episodes, since
# frames of one episode are nearly copies of each other.

# %% tags=["parameters"]
a = "runs/walk/features-trained"
b = "runs/walk/features-start"
layers = []
neighbours = 10
resamples = 200
seed = 0

# %%
from probes.report.params import RepresentationSimilarityParams

params = RepresentationSimilarityParams(a=a, b=b, layers=layers, neighbours=neighbours, resamples=resamples, seed=seed)

# %%
from probes.report import pages
from probes.report.views import representation_similarity as view

one, other = view.open_inputs(params)
alike = view.compare(one, other, params)

# %%
from probes.figures_probe import similarity_figure

figure = similarity_figure(alike.cka.to_frame(), label_a=one.label, label_b=other.label)
words = view.figure_words(alike, one, other)
pages.show(figure, alt=words)

# %%
pages.table(view.cka_table(alike))

# %% [markdown]
# ## Other measures
#
# Shared nearest neighbours (of other episodes), CKNNA, and what the best rotation explains (Procrustes). They need not
# agree: neighbours say nothing of what lies beyond them, and a rotation forgives no scale of single directions.

# %%
pages.table(view.other_table(alike))

# %%
pages.finish(
    params,
    answer=view.answer(alike, one, other),
    badges=view.badges(one, other),
    numbers=view.numbers(alike),
    figure=figure,
    alt=words,
)
