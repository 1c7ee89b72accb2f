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
# A readout (ridge, logistic regression or a small MLP) reads quantities that control needs out of frozen features,
# pooled in 4 × 4 cells, of every layer. It is fitted and tuned on some episodes and tested once on others; R² counts
# from the mean predictor (0), accuracy from the most frequent class. The same is done with checkpoints that were
# trained otherwise, with a network of random weights, with raw pixels, with labels that belong to other episodes, and
# with a control task that can only be learnt by heart.

# %% tags=["parameters"]
checkpoint = "data/nano_arms/vla"
reference = "data/nano_arms/base"
others = ["data/nano_arms/vlm", "data/nano_arms/spatial", "data/nano_arms/fast", "data/nano_arms/scratch"]
data = "data/nano_arms/probes"
layers = ["vision.0..-1", "projector", "decoder.0..-1"]
targets = ["gripper_xyz", "object_xy", "next_action", "task_progress", "grasp"]
readout = "linear"
frames = 480
seed = 0

# %%
from probes.report.params import FeatureProbeParams

params = FeatureProbeParams(
    checkpoint=checkpoint, reference=reference, others=others, data=data, layers=layers, targets=targets,
    readout=readout, frames=frames, seed=seed,
)  # fmt: skip

# %%
from probes.report import pages
from probes.report.views import feature_probe as view

found = view.open_inputs(params)
results = view.probes(found, params)
changed = view.changed(results, params)

# %%
from probes.figures_layers import layers_figure

figure, words = layers_figure(view.frame(results), changed), view.layers_words(results)
pages.show(figure, alt=words)

# %% [markdown]
# ## What appears, what is lost?
#
# Every checkpoint at the layer that did best on its selection episodes, against the reference at its own.

# %%
pages.table(view.changes_table(results, changed), caption=view.changes_caption(results, changed))

# %% [markdown]
# ## The checkpoint in question
#
# Selectivity: score minus that of the control task. Detectable: the smallest gain that so many episodes show with 80 %
# power.

# %%
pages.table(view.target_table(results))

# %%
pages.finish(
    params,
    answer=view.answer(results, changed),
    badges=view.badges(found),
    numbers=view.numbers(results, changed),
    figure=figure,
    alt=words,
)
