# %% [markdown]
# # Compare over-archs, and ask the best one what it relies on
# A first look. `ssr-rec compare` does it with equal search budgets and several seeds, `ssr-rec tune` searches settings.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from ssr_rec import CTRClassifier
from ssr_rec.explaining.explanation import Question, explain_run
from ssr_rec.explaining.figures import calibration_figure, importance_figure
from ssr_rec.explaining.text import tables
from ssr_rec.runs.curves import comparison_figure
from ssr_rec.runs.report import read_run
from ssr_rec.runs.table import runs_table

rng = np.random.default_rng(3)
rows = 15_000
user, item, hour = rng.integers(0, 60, rows), rng.integers(0, 40, rows), rng.integers(0, 24, rows)
odds = 1.5 * np.where(user % 4 == item % 4, 1, -1) + 0.8 * np.cos((hour - 20) / 24 * 2 * np.pi) - 0.7
log = pd.DataFrame({"user_id": user, "item_id": item, "hour": hour, "noise": rng.choice(list("abc"), rows)})
log["click"] = (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(int)

# %%
over_archs = {
    "mlp": {"name": "mlp", "hidden": [64, 64]},
    "ssr_s": {"name": "ssr", "filter": "static", "num_views": 4, "view_dim": 32},
}
folder = Path(tempfile.mkdtemp())
for name, over_arch in over_archs.items():
    model = CTRClassifier(
        over_arch,
        epochs=2,
        batch_size=256,
        verbose=False,
        config={"embeddings": {"learning_rate": 0.1}, "train": {"eval_every": 25}},
    )
    model.fit(log, labels="click", categorical=["user_id", "item_id", "hour", "noise"], group_id="user_id")
    model.to_run(folder / name)
runs = [read_run(folder / name) for name in over_archs]
print(runs_table(runs))

# %%
comparison_figure(runs)

# %% [markdown]
# Which columns does the best rely on? Each is exchanged between rows, and what that costs is its importance.
# `noise` should cost nothing.

# %%
best = max(
    over_archs, key=lambda name: runs[list(over_archs).index(name)].report.measure("test", "click", "auc") or 0.0
)
found = explain_run(folder / best, Question(importance_rows=2_000, seeds=2, min_rows=100), folder / best / "data")
importance_figure(found)

# %%
calibration_figure(found)

# %%
print(tables(found, 8))
costs = {group["name"]: np.mean(group["auc"]["click"]) for group in found["importance"]["groups"]}
assert costs["user_id"] > costs["noise"]
