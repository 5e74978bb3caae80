# %% [markdown]
# # Train a run and look at it
#
# `toolkit.fit` trains a recipe and returns the run. This recipe is a small ConvNet on scikit-learn's digits; the
# settings in the list override its keys, as `--set` does on the command line.

# %%
import toolkit
from toolkit.ready_recipes import recipe_path

settings = ["data.images_per_class=80", "train.epochs=6", "train.log_every=5", "tracking.trackers=[]"]
recipe = toolkit.load_recipe(recipe_path("quickstart"), settings)
run = toolkit.fit(recipe)

# %% [markdown]
# A notebook shows the run with its metrics and learning curves.

# %%
run

# %% [markdown]
# The metrics are data frames: one row per epoch, and one per logged step.

# %%
run.metrics[["train/loss", "val/loss", "val/accuracy"]]

# %%
run.metrics[["train/loss", "val/loss"]].plot()

# %%
run.steps["train/step_loss"].plot()

# %% [markdown]
# The summary has the metrics of the best and the last epoch; `evaluate` computes those of the best one again.

# %%
run.summary["best"]

# %%
run.evaluate("test")

# %% [markdown]
# Everything is in the run directory, so that the run can be opened later, and on another machine.

# %%
toolkit.open_run(run.path).classes
