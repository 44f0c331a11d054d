"""A small prepared dataset of days."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ssr_rec.data.schema import Days, Schema
from ssr_rec.data.shards import arrow_schema, write_shards
from ssr_rec.data.splits import Split
from tests.conftest import FEATURES, draw_rows

ROWS = {"2024-02-28": 300, "2024-02-29": 260, "2024-03-01": 333, "2024-03-02": 128, "2024-03-03": 201}
DAYS = list(ROWS)


def write_days(
    folder: Path,
    rows: Mapping[str, int] = ROWS,
    fitted: int = 1,
    seed: int = 0,
    redrawn: Mapping[str, int] | None = None,
) -> Path:
    """Days of so many rows each, drawn from the seed and their number; those in ``redrawn`` from another seed."""
    schema = Schema(
        name="days", dataset_id=f"days-{seed}", features=FEATURES, labels=["click", "like"], group_id="user", splits={}
    )
    splits = {}
    for number, (day, num_rows) in enumerate(rows.items()):
        batch = draw_rows(num_rows, np.random.default_rng(((redrawn or {}).get(day, seed), number)))
        shards = write_shards([batch], arrow_schema(schema), folder, f"days/{day}", rows_in_group=64)
        rates = {label: float(np.mean(batch.column(label).to_numpy())) for label in schema.labels}
        splits[day] = Split(num_rows=num_rows, positive_rate=rates, shards=shards)
    days = Days(names=list(rows), fitted=fitted)
    schema.model_copy(update={"splits": splits, "days": days}).write(folder)
    return folder


def options(data: Path, runs: Path, *more: str) -> list[str]:
    return [
        *("--over_arch.num_views=2", "--over_arch.view_dim=8", "--embeddings.dim=8", "--embeddings.learning_rate=0.02"),
        *("--train.batch_size=64", "--train.eval_batch_size=100", "--train.eval_every=null", "--train.log_every=1"),
        *("--data.days=all", "--name=run", f"--data.path={data}", f"--runs={runs}", *more),
    ]
