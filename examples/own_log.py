# %% [markdown]
# # Your own log: name the columns, split by time, keep the model
# The steps of `docs/tutorial.md` in a notebook. Replace the first cell by `pd.read_csv` or `pd.read_parquet`.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ssr_rec import CTRClassifier

rng = np.random.default_rng(1)
rows = 15_000
user, item = rng.integers(0, 60, rows), rng.zipf(1.4, rows) % 40
city = rng.choice(["Paris", "Lima", None], rows)
click = rng.random(rows) < 1 / (1 + np.exp(1.5 - 3.0 * (user % 3 == item % 3) - 0.6 * (city == "Lima")))
log = pd.DataFrame(
    {
        "time": pd.Timestamp("2026-11-01") + pd.to_timedelta(np.sort(rng.random(rows) * 10), unit="D"),
        "user_id": user,
        "item_id": item,
        "city": city,
        "price": np.round(rng.lognormal(3, 1, rows), 2),
        "seconds_on_page": np.where(click, rng.exponential(60, rows), 0.0),
        "click": click.astype(int),
        "pay": (click & (rng.random(rows) < 0.3)).astype(int),
    }
)
log.head()

# %% [markdown]
# `seconds_on_page` is a consequence of the click: a model that sees it knows the answer. No guess can know that, so
# name such columns under `ignore`. Two labels are two tasks. Train on eight days, choose on the ninth, test on the
# tenth.

# %%
model = CTRClassifier(
    over_arch={"name": "ssr", "filter": "static", "num_views": 4, "view_dim": 32},
    epochs=3,
    batch_size=256,
    config={"embeddings": {"learning_rate": 0.1}, "train": {"eval_every": 25}},
)
model.fit(
    log,
    labels=["click", "pay"],
    ignore=["seconds_on_page"],
    group_id="user_id",
    split={"type": "time", "column": "time", "boundaries": ["2026-11-09", "2026-11-10"]},
)

# %%
model.curves()

# %%
pd.DataFrame(model.report_.test).T

# %% [markdown]
# Are the probabilities right, or only their order? Predicted against observed rates of ten equal parts of the last day:

# %%
last = log[log["time"] >= "2026-11-10"]
click_p, pay_p = (p[:, 1] for p in model.predict_proba(last))
picture, ax = plt.subplots(figsize=(4.5, 4))
for p, task in ((click_p, "click"), (pay_p, "pay")):
    parts = pd.DataFrame({"p": p, "y": last[task].to_numpy()}).groupby(pd.qcut(p, 10, duplicates="drop"), observed=True)
    ax.plot(parts["p"].mean(), parts["y"].mean(), "o-", label=task)
ax.plot([0, 1], [0, 1], color="#999999", linewidth=1)
ax.set_xlabel("mean prediction")
ax.set_ylabel("observed rate")
ax.legend()

# %% [markdown]
# `save` keeps what scoring needs; `to_run` a run folder that every command takes (`ssr-rec show`, `export`, `explain`).

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "model")
    again = CTRClassifier.load(Path(folder) / "model")
    assert np.array_equal(again.predict_proba(last)[0], model.predict_proba(last)[0])
assert model.report_.test["click"]["auc"] > 0.6
