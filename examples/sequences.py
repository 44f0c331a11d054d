# %% [markdown]
# # What a user clicked before: sequences
# The history of each row is made from the log itself, of the rows before it alone. An encoder weighs its events by how
# they fit the item (`docs/sequences.md`).

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ssr_rec import CTRClassifier

# %% [markdown]
# A user's taste is not in his id, since every user comes a few times only: it is in what he clicked.

# %%
rng = np.random.default_rng(2)
users, visits, kinds = 1_000, 14, 3
user = np.repeat(np.arange(users), visits)
taste = np.repeat(rng.integers(0, kinds, users), visits)
item = rng.integers(0, 12, users * visits)
click = rng.random(users * visits) < np.where(item % kinds == taste, 0.9, 0.1)
log = pd.DataFrame(
    {
        "time": pd.Timestamp("2026-11-01") + pd.to_timedelta(rng.random(users * visits) * 10, unit="D"),
        "user_id": user,
        "item_id": item,
        "click": click.astype(int),
    }
).sort_values("time", ignore_index=True)

# %%
history = {"from_log": {"by": "user_id", "order": "time", "where": "click = 1", "columns": ["item_id"]}}
settings = {
    "over_arch": {"name": "mlp", "hidden": [64, 32]},
    "epochs": 3,
    "batch_size": 128,
    "verbose": False,
    "config": {"embeddings": {"learning_rate": 0.1}, "train": {"eval_every": 20}},
}
data = {
    "labels": "click",
    "categorical": ["user_id", "item_id"],
    "group_id": "user_id",
    "sequences": {"clicked": {"max_length": 10, **history}},
    "split": {"type": "time", "column": "time", "boundaries": ["2026-11-08", "2026-11-09"]},
}
models = {
    "mean of the history": CTRClassifier(**settings).fit(log, **data),
    "DIN on the history": CTRClassifier(**settings, encoders={"clicked": "din"}).fit(log, **data),
}
auc = pd.Series({name: model.report_.test["click"]["auc"] for name, model in models.items()}, name="test AUC")
auc

# %%
picture, ax = plt.subplots(figsize=(6, 2.4))
ax.barh(auc.index, auc)
ax.set_xlim(0.5, 1)
ax.set_xlabel("test AUC")

# %%
models["DIN on the history"].curves()

# %% [markdown]
# To score, give each row its history, newest last, in the column `clicked_item_id`.

# %%
new = pd.DataFrame({"user_id": [9_001, 9_001], "item_id": [4, 5], "clicked_item_id": [[1, 4, 7, 10], [1, 4, 7, 10]]})
new.assign(p_click=models["DIN on the history"].predict_proba(new)[:, 1])

# %%
assert auc["DIN on the history"] > 0.6
