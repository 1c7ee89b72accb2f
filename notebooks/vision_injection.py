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
# # Does telling the vision encoder about actions help, and does it survive freezing?
#
# First the VLM learns to write actions as FAST tokens, with its vision encoder frozen or trained; then it becomes
# a policy whose encoder is frozen or trained. Here the first stage's pictures also come in two looks: the
# policy's own, or real-like.

# %% tags=["parameters"]
study = "studies/nano.toml"
level = 0.95

# %%
from probes.report.study_params import VisionInjectionParams

params = VisionInjectionParams(study=study, level=level)

# %%
from probes.report import pages
from probes.report.views import study as shared
from probes.report.views import vision_injection as view

study = shared.open_study(params.study)
found = view.found(study, level=params.level)

# %%
figure = view.figure(found)
narrow = view.figure(found, stacked=True)
words = view.figure_words(found)
pages.show(figure, alt=words, narrow=narrow)

# %% [markdown]
# ## The square, here and in the paper

# %%
pages.table(view.square(study), caption="Measured here: mean over training seeds (lowest to highest seed).")

# %%
pages.table(
    view.paper_table(), caption="The paper's: success on SimplerEnv-Bridge, per cent of 96 episodes, one run each."
)

# %% [markdown]
# ## Differences from no first stage

# %%
pages.table(shared.contrast_table(found, stage=True), caption=shared.CAPTION)

# %%
pages.finish(
    params,
    answer=view.answer(study, found),
    badges=shared.badges(study),
    numbers={"contrasts": shared.numbers(found)},
    figure=figure,
    alt=words,
    narrow=narrow,
)
