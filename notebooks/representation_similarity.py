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
checkpoint = "data/nano_arms/vla"
reference = "data/nano_arms/base"
twin = ["data/nano_arms/vla-twin"]
data = "data/nano_arms/probes"
layers = ["vision.0..-1", "projector", "decoder.0..-1"]
pool = "mean"
frames = 0
neighbours = 10
resamples = 200
seed = 0

# %%
from probes.report.params import RepresentationSimilarityParams

params = RepresentationSimilarityParams(
    checkpoint=checkpoint, reference=reference, twin=twin, data=data, layers=layers, pool=pool, frames=frames,
    neighbours=neighbours, resamples=resamples, seed=seed,
)  # fmt: skip

# %%
from probes.report import pages
from probes.report.views import representation_similarity as view

found = view.open_inputs(params)
alike = view.compare(found, params)

# %%
figure, words = view.figure(alike), view.figure_words(alike)
pages.show(figure, alt=words)

# %%
pages.table(view.layer_table(alike), caption=view.layer_caption(alike))

# %% [markdown]
# ## All pairs of layers

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
    answer=view.answer(alike),
    badges=view.badges(found),
    numbers=view.numbers(alike),
    figure=figure,
    alt=words,
)
