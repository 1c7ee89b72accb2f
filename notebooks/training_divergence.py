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
# Two trainings started from one base: one on questions about the scene (VLM), one on actions (VLA). Their weight
# changes are compared per module group in size and direction, and the gradients of the two losses at the base in
# direction. Two random changes of so many parameters have a cosine very near zero, so that bar is low; two runs of
# the *same* objective from other seeds are the comparison that counts: where `vlm4vla diverge --trajectory` was given
# four recorded runs per arm, the step after which the arms part is told with its p; otherwise the lines below say that
# there is no ceiling.

# %% tags=["parameters"]
divergence = "runs/walk/divergence"

# %%
from probes.report.params import TrainingDivergenceParams

params = TrainingDivergenceParams(divergence=divergence)

# %%
from probes.figures_probe import divergence_figure
from probes.report import pages
from probes.report.views import training_divergence as view

told, weights, gradients = view.open_inputs(params.divergence)
figure = divergence_figure(weights, gradients)
words = view.figure_words(weights)
pages.show(figure, alt=words)

# %%
pages.table(view.verdict_table(told))

# %% [markdown]
# ## The weights
#
# Change: |new − base| / |base| of the group. Cosine: between the two changes.

# %%
pages.table(view.weight_table(weights))

# %% [markdown]
# ## The gradients at the base
#
# The naive cosine of two mini-batch gradients shrinks with their noise; the corrected one divides by what the
# gradients of independent half-batches of the same loss have in common. It may pass ±1 by the noise that is left.

# %%
pages.table(view.gradient_table(gradients), caption=view.gradient_words(told))

# %% [markdown]
# ## A step on one objective, and the losses of both
#
# One step of a thousandth of the weights' norm, along the gradient of one half-batch; losses of another one.

# %%
pages.table(view.interference_table(told))

# %% [markdown]
# ## What else was measured
#
# Every panel shows its null and its ceiling where there is one.

# %%
from IPython.display import display

display(*[pages.show(picture, alt=words) for picture, words in view.further_figures(params.divergence)])

# %%
pages.finish(
    params,
    answer=view.answer(told, gradients),
    badges=view.badges(told),
    numbers=view.numbers(told),
    figure=figure,
    alt=words,
)
