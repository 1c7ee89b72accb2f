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
# # Where do VLM training and VLA training part?
#
# Two trainings started from one base: one on questions about the scene (VLM), one on actions (VLA). What they did to
# the weights, in which way their losses pull, what is left of the representations, and what lies between them.
# Nothing here stands alone: two *seeds of one training* are the ceiling of a comparison; changes drawn at random,
# permuted labels and shuffled frames are its floor.

# %% tags=["parameters"]
base = "data/nano_arms/base"
vlm = ["data/nano_arms/vlm"]
vla = ["data/nano_arms/vla", "data/nano_arms/vla-twin"]
trajectories = ["data/nano_arms/trajectories/*"]
data = "data/nano_arms/probes"
groups = []
layers = ["vision.0..-1", "projector", "decoder.0..-1"]
frames = 300
batches = 8
seed = 0

# %%
from probes.report.params import TrainingDivergenceParams

params = TrainingDivergenceParams(
    base=base, vlm=vlm, vla=vla, trajectories=trajectories, data=data, groups=groups, layers=layers, frames=frames,
    batches=batches, seed=seed,
)  # fmt: skip

# %%
from IPython.display import display

from probes.report import pages
from probes.report.views import training_divergence as view

found = view.open_inputs(params)
figure, words = view.weights_figure(found), view.figure_words(found)
pages.show(figure, alt=words)

# %% [markdown]
# ## At a glance

# %%
pages.statements(view.glance(found))

# %% [markdown]
# ## The weights

# %%
pages.table(view.weight_table(found), caption=view.weight_words(found))

# %% [markdown]
# ## The way there
#
# Several seeds of both trainings from the same base, recorded on the way. The corrected cosine rests on products of
# different seeds only. The arms part at the step after which they lie further apart than the seeds of either do, at
# every later step; how often permuted labels reach as much is the p. A path that looks planned in two dimensions is no
# finding: beside its principal components stand those of walks without a plan.

# %%
display(*[pages.show(picture, alt=told) for picture, told in view.pictures(found, "paths")])

# %% [markdown]
# ## The gradients at the base
#
# The naive cosine of two mini-batch gradients shrinks with their noise; the corrected one divides by what the
# gradients of independent half-batches of the same loss have in common. It may pass ±1 by the noise that is left.

# %%
display(*[pages.show(picture, alt=told) for picture, told in view.pictures(found, "gradients")])
pages.table(view.gradient_table(found), caption=view.gradient_words(found))

# %% [markdown]
# ## A step on one objective, and the losses of both
#
# One step of a thousandth of the weights' norm, along the gradient of one half-batch; losses of another one.

# %%
pages.table(view.interference_table(found))

# %% [markdown]
# ## The representations
#
# Debiased CKA of each layer with the base's, and a linear readout that was fitted to the base's features and is then
# given those of the others. Features that were only turned keep their CKA and their own readout, and lose the
# carried one.

# %%
display(*[pages.show(picture, alt=told) for picture, told in view.pictures(found, "representations")])

# %% [markdown]
# ## What lies between
#
# Both losses on straight lines between the checkpoints, beside lines to random changes that are as long in every
# tensor, and on the plane of both changes. The action loss goes through one query and head at every point, the VLA's.

# %%
display(*[pages.show(picture, alt=told) for picture, told in view.pictures(found, "lines")])

# %%
pages.finish(
    params,
    answer=view.answer(found),
    badges=view.badges(found),
    numbers=view.numbers(found),
    figure=figure,
    alt=words,
)
