# %% [markdown]
# # Compare the runs of a study
#
# A study varies keys of a recipe. This one trains three learning rates with two seeds each; it is trained with
# `toolkit study learning-rates.toml`, here from Python.

# %%
import sys
from pathlib import Path
from subprocess import run as run_command

import toolkit
from toolkit.ready_recipes import copy_files

copy_files("quickstart", None)
Path("learning-rates.toml").write_text("""
extends = "recipes/quickstart.toml"
recipe.name = "learning-rates"
data.images_per_class = 40
train.epochs = 3
tracking.trackers = []

[study]
seeds = 2

[study.grid]
optimizer.lr = [4e-4, 4e-3, 4e-2]
""")
run_command([sys.executable, "-m", "toolkit", "study", "learning-rates.toml"], check=True)
study = toolkit.open_study("runs/learning-rates")

# %% [markdown]
# A notebook shows the study with its table and the curves of its rows.

# %%
study

# %% [markdown]
# The table has one row per setting, with means over the seeds; accuracies are fractions.

# %%
study.table[["val_accuracy", "val_accuracy_std", "test_accuracy"]]

# %% [markdown]
# `run_table` has one row per run, with the varied keys as columns.

# %%
study.run_table.groupby("optimizer.lr")["val_accuracy"].agg(["min", "max"])

# %% [markdown]
# The runs themselves, for everything else. `best` is the one with the best validation metric in the best row.

# %%
axes = None
for run in study.runs:
    axes = run.metrics["val/accuracy"].plot(ax=axes, label=study.run_table.loc[run.id, "row"], legend=True)

# %%
study.best.evaluate("test")
