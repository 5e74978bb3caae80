# %% [markdown]
# # Predict images, and explain the mistakes of a run
#
# The run is the one that `train_and_look.py` has trained: the newest one in `runs/quickstart`.

# %%
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

import toolkit
from toolkit.inference.explain import explain_run, worst_mistakes

run = toolkit.open_run("runs/quickstart")

# %% [markdown]
# `predict` takes paths, folders, Pillow images or arrays. Here they are arrays, uint8 [8, 8].

# %%
images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
run.predict(list(images[:3]), top_k=2)

# %% [markdown]
# The predictions of the test images are in the run. Its mistakes, the most confident ones first:

# %%
predictions = run.predictions
is_wrong = predictions["label"] != predictions["prediction"]
mistakes = predictions[is_wrong].sort_values("probability", ascending=False)
mistakes.head(10)

# %%
pd.crosstab(predictions["label"], predictions["prediction"])

# %% [markdown]
# Which classes come next for them? The name of an image of the digits is its number.

# %%
numbers = [int(name.removeprefix("digits/")) for name in mistakes.index[:5]]
[one.top for one in run.predict([images[number] for number in numbers], top_k=3)]

# %% [markdown]
# Grad-CAM shows which regions support the prediction, and which the label. It needs the extra `explain`.

# %%
subjects = worst_mistakes(run, run.model, count=4)
layer, explanations, figures = explain_run(run.model, subjects, None, Path("explained"), print)
figures
