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
# # Which parts of the picture move the policy?
#
# One number of a policy's answer is attributed to the places of the picture that it saw, frame by frame of one episode.
# Beside the maps: whether they are complete, whether hiding the best-scored places first changes the answer faster than
# random orders do, and how alike the maps of another checkpoint of this policy are.

# %% tags=["parameters"]
checkpoint = "data/nano_arms/vla"
reference = "data/nano_arms/scratch"
data = "data/nano_arms/probes"
episode = 1
frames = 4
target = "x"
method = "ig"
orders = 20
seed = 0

# %%
from probes.report.params import AttributionParams

params = AttributionParams(
    checkpoint=checkpoint, reference=reference, data=data, episode=episode, frames=frames, target=target,
    method=method, orders=orders, seed=seed,
)  # fmt: skip

# %%
from probes.report import pages
from probes.report.views import attribution as view

found = view.explained(params)
figure, words = view.sheet(found), view.sheet_words(found)
pages.show(figure, alt=words)

# %%
pages.table(view.frame_table(found), caption=view.completeness(found))

# %% [markdown]
# ## Are the maps faithful?
#
# Deletion hides places, insertion shows them, the best-scored first; the grey band holds 95 % of random orders.

# %%
pages.show(view.curves(found), alt=view.curve_words(found))

# %% [markdown]
# ## The same frames before the reference checkpoint
#
# Rank correlation of both checkpoints' maps of one frame: a map that is the same for another policy says something
# about the picture, not about the policy.

# %%
pages.table(view.reference_table(found))

# %%
pages.finish(
    params,
    answer=view.answer(found),
    badges=view.badges(found),
    numbers=view.numbers(found),
    figure=figure,
    alt=words,
)
