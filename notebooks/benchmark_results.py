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
# # How often does each policy succeed?
#
# Every policy is rolled out closed loop; two are compared where they ran the same episodes. Beside the trained
# policies stand baselines that never look at the picture (`zero`: no motion, `random`: random motion, `mean-action`:
# the mean demonstrated action) and, where it was evaluated, the `scripted` expert, which reads the simulator's state
# and bounds what the demonstrations can teach.

# %% tags=["parameters"]
rows = ["runs/walk/eval/*"]
level = 0.95

# %%
from probes.report.params import BenchmarkResultsParams

params = BenchmarkResultsParams(rows=rows, level=level)

# %%
from probes.report import pages
from probes.report.views import benchmark_results as view

episodes = view.episode_rows(params.rows)
overall = view.success(episodes, level=params.level)
by_task = view.success(episodes, level=params.level, by=("policy", "task"))

# %% [markdown]
# ## All tasks together

# %%
figure = view.overall_figure(overall)
words = view.figure_words(overall)
pages.show(figure, alt=words)

# %%
pages.table(view.readable(overall, level=params.level), caption=view.protocol_words(episodes))

# %% [markdown]
# ## Task by task
#
# With few episodes a task, the intervals are wide: a difference between two policies on one task counts only when
# their intervals are far apart.

# %%
pages.show(
    view.task_figure(by_task),
    narrow=view.task_figure(by_task, columns=1),
    alt="Success rate of each policy on each task; the table gives the numbers.",
)

# %%
pages.table(view.readable(by_task, level=params.level))

# %%
pages.finish(
    params,
    answer=view.answer(overall, episodes, level=params.level),
    badges=view.badges(episodes),
    numbers={"overall": overall.to_dict("records"), "by_task": by_task.to_dict("records")},
    figure=figure,
    alt=words,
)
