# %% [markdown]
# # Quickstart: from a DataFrame to a click-through-rate model
# Open this file as a notebook (VS Code, PyCharm and jupytext do), or run it: `python examples/quickstart.py`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ssr_rec import CTRClassifier

# %% [markdown]
# A log: each row is an item that a user was shown. Users like one of four kinds of items.

# %%
rng = np.random.default_rng(0)
rows = 15_000
user, item = rng.integers(0, 60, rows), rng.integers(0, 40, rows)
likes = np.where(user % 4 == item % 4, 1.0, -1.5)
log = pd.DataFrame({"user_id": user, "item": [f"item-{i}" for i in item], "price": rng.lognormal(3, 1, rows)})
log["click"] = (rng.random(rows) < 1 / (1 + np.exp(-likes))).astype(int)
log.head()

# %% [markdown]
# `fit` guesses what each column is, says so, prepares the rows and trains. A tenth of them chooses the best evaluation,
# and another tenth is the test.

# %%
model = CTRClassifier(
    over_arch={"name": "mlp", "hidden": [64, 64]},
    epochs=3,
    batch_size=256,
    config={"embeddings": {"learning_rate": 0.1}, "train": {"eval_every": 20}},
)
model.fit(log, labels="click", group_id="user_id")

# %%
model.curves()

# %%
model.report_.test["click"]

# %% [markdown]
# Probabilities of a click for new rows. A user or item that training has not seen is no error.

# %%
new = pd.DataFrame({"user_id": [1, 1, 987_654], "item": ["item-5", "item-6", "item-5"], "price": [20.0, 20.0, 20.0]})
new.assign(p_click=model.predict_proba(new)[:, 1])

# %% [markdown]
# Does the model know what the log was drawn from? The mean prediction by kind of user (rows) and of item (columns):

# %%
grid = pd.DataFrame({"user": user % 4, "item": item % 4, "p": model.predict_proba(log)[:, 1]})
picture, ax = plt.subplots(figsize=(4.5, 3.5))
shown = ax.imshow(grid.pivot_table(index="user", columns="item", values="p"), vmin=0, vmax=1)
ax.set_xlabel("kind of item")
ax.set_ylabel("kind of user")
picture.colorbar(shown, label="mean predicted click rate")
assert model.report_.test["click"]["auc"] > 0.7
