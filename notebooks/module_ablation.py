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
# # Which part has to be trained, and which has to be pretrained?
#
# Freezing: a part of the VLM stays as pretraining left it. From scratch: a part (or all of it) starts from random
# weights. Both beside full fine-tuning of the pretrained model, at equal steps, with longer arms for equal
# compute.

# %% tags=["parameters"]
study = "studies/nano.toml"
level = 0.95

# %%
from probes.report.study_params import ModuleAblationParams

params = ModuleAblationParams(study=study, level=level)

# %%
from probes.report import pages
from probes.report.views import module_ablation as view
from probes.report.views import study as shared

study = shared.open_study(params.study)
freezing = view.found(study, "freezing", level=params.level)
scratch = view.found(study, "scratch", level=params.level)

# %% [markdown]
# ## Freezing

# %%
figure = view.figure(freezing, "freezing")
narrow = view.figure(freezing, "freezing", stacked=True)
words = view.figure_words(freezing, "frozen parts")
pages.show(figure, alt=words, narrow=narrow)

# %%
pages.table(shared.contrast_table(freezing), caption=shared.CAPTION)

# %%
pages.table(view.paper_table("freezing"), caption="The paper's: one training run each.")

# %% [markdown]
# ## From scratch

# %%
pages.show(
    view.figure(scratch, "scratch"),
    narrow=view.figure(scratch, "scratch", stacked=True),
    alt=view.figure_words(scratch, "parts from scratch"),
)

# %%
pages.table(shared.contrast_table(scratch), caption=shared.CAPTION)

# %%
pages.table(view.paper_table("scratch"), caption="The paper's: one training run each.")

# %% [markdown]
# ## The policy's head

# %%
pages.table(view.head_table(study), caption="A flow head draws its actions from noise, a regression head does not.")

# %%
pages.table(view.repeat_table(study), caption="The same episodes again with other draws of the noise, per policy.")

# %%
pages.finish(
    params,
    answer=view.answer(study, freezing, scratch),
    badges=shared.badges(study),
    numbers=view.numbers(study, freezing, scratch),
    figure=figure,
    alt=words,
    narrow=narrow,
)
