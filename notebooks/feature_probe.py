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
# # What does the vision encoder know that control needs?
#
# A readout (ridge, logistic regression or a small MLP) reads quantities that control needs out of frozen, pooled
# features of the vision encoder. It is fitted and tuned on some episodes and tested once on others; R² counts from the
# mean predictor (0), accuracy from the most frequent class. Beside it stand the same readout of the raw pixels, of
# labels that belong to other episodes, a control task that can only be learnt by heart, and the features that training
# started from.

# %% tags=["parameters"]
trained = "runs/walk/features-trained"
start = "runs/walk/features-start"
store = "runs/walk/demos"
targets = ["gripper_xyz", "next_action", "task_progress"]
readout = "linear"
resamples = 200
seed = 0

# %%
from probes.report.params import FeatureProbeParams

params = FeatureProbeParams(
    trained=trained, start=start, store=store, targets=targets, readout=readout, resamples=resamples, seed=seed
)

# %%
from probes.report import pages
from probes.report.views import feature_probe as view

after, before, episodes = view.open_inputs(params)
results = view.probes(after, before, episodes, params)
result = results[0]

# %%
from probes.figures_layers import layers_figure
from probes.figures_probe import probe_figure, similarity_figure

figure = probe_figure(result.to_frame())
words = view.figure_words(result)
pages.show(figure, alt=words)

# %%
pages.table(view.readout_table(result), caption="▸ marks the layer that did best on the selection episodes.")

# %% [markdown]
# ## Layer by layer
#
# Every target over the layers. Circles mark the layers that did best on the selection episodes. Selectivity: score
# minus that of the control task. Detectable: the smallest gain that so many episodes show with 80 % power.

# %%
pages.show(layers_figure(view.frame(results)), alt=view.layers_words(results))

# %%
pages.table(view.target_table(results))

# %% [markdown]
# ## Compared on the same episodes

# %%
pages.table(view.difference_table(result))

# %% [markdown]
# ## How alike are the two representations?
#
# Debiased centred kernel alignment (CKA) of the same frames before and after training: 1 is the same up to rotation and
# scale, 0 unrelated. A value in brackets does not rise above what shuffled images give.

# %%
alike = view.similarity(after, before, resamples=params.resamples, seed=params.seed)
pages.show(
    similarity_figure(alike.to_frame(), label_a=after.label, label_b=before.label),
    alt=view.similarity_words(alike),
)

# %%
pages.table(view.similarity_table(alike))

# %%
pages.finish(
    params,
    answer=view.answer(result),
    badges=view.badges(after, before, episodes),
    numbers=view.numbers(results, alike),
    figure=figure,
    alt=words,
)
