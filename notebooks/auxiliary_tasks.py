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
# # Do auxiliary tasks before the policy help?
#
# A VLM is fine-tuned on embodied questions or dense targets first and becomes a policy afterwards. Beside each
# arm stands whether its first stage learnt its own task at all: an arm that did not has tested nothing. As many
# policy steps for all; the arm without a task but with equal compute says what the extra steps alone would have
# done.

# %% tags=["parameters"]
study = "studies/nano.toml"
level = 0.95

# %%
from probes.report.study_params import AuxiliaryTasksParams

params = AuxiliaryTasksParams(study=study, level=level)

# %%
from probes.report import pages
from probes.report.views import auxiliary_tasks as view
from probes.report.views import study as shared

study = shared.open_study(params.study)
found = view.found(study, level=params.level)

# %%
figure = view.figure(found)
narrow = view.figure(found, stacked=True)
words = view.figure_words(found)
pages.show(figure, alt=words, narrow=narrow)

# %% [markdown]
# ## Measured here

# %%
pages.table(shared.contrast_table(found, stage=True), caption=shared.CAPTION)

# %% [markdown]
# ## In the paper
#
# Best, median and worst of three checkpoints of one training run each, on CALVIN ABC-D (read off a figure).

# %%
pages.table(view.paper_table())

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
