"""Shards of any sizes on three ranks: no hang, no sample lost, metrics those of one process over the plain files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.schema import Schema
from ssr_rec.data.shards import arrow_schema
from ssr_rec.data.splits import Split
from ssr_rec.metrics.exact import evaluate_predictions
from tests.checkpointing.test_resume import losses
from tests.conftest import FEATURES, draw_rows
from tests.faults.harness import options
from tests.jobs import predictions_job, read_rows_job, train_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.faults

UNEVEN = {
    "sizes that have nothing in common": [(5, 5), (400, 64), (37, 10), (211, 211), (1, 1)],
    "an empty shard": [(130, 64), (0, 64), (70, 64)],
    "one row group for three ranks": [(200, 200)],
    "a last batch of one row": [(129, 50)],
    "most rows in one shard": [(3, 3), (900, 100), (2, 2)],
}
"""(rows, rows of a row group) of each shard."""


def write_uneven(folder: Path, shards: list[tuple[int, int]]) -> Path:
    rng = np.random.default_rng(3)
    schema = Schema(
        name="uneven", dataset_id="uneven", features=FEATURES, labels=["click", "like"], group_id="user", splits={}
    )
    splits = {}
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        written = []
        for number, (rows, in_group) in enumerate(shards):
            table = pa.Table.from_batches([draw_rows(rows, rng)]).cast(arrow_schema(schema))
            path = f"{split}/{number:05d}.parquet"
            pq.write_table(table, folder / path, row_group_size=max(1, in_group))
            written.append({"path": path, "num_rows": rows})
        values = {"num_rows": sum(r for r, _ in shards), "positive_rate": {}, "shards": written}
        splits[split] = Split.model_validate(values)
    schema.model_copy(update={"splits": splits}).write(folder)
    return folder


@pytest.mark.parametrize("case", list(UNEVEN))
def test_three_ranks_are_one_process(tmp_path, case):
    data = write_uneven(tmp_path / "data", UNEVEN[case])
    rows = sum(rows for rows, _ in UNEVEN[case])
    reports = {}
    for world_size in (1, 3):
        runs = tmp_path / str(world_size)
        reports[world_size] = run_ranks(train_job, world_size, options(data, runs, "--over_arch.fusion_dropout=0.0"))[0]
        assert reports[world_size]["steps"] == 3 * -(-rows // 64)
    assert np.abs(losses(tmp_path / "1") - losses(tmp_path / "3")).max() < 1e-5
    for task in ("click", "like"):
        for metric in ("auc", "gauc", "logloss", "ne", "gauc_rows"):
            assert reports[3]["test"][task][metric] == pytest.approx(
                reports[1]["test"][task][metric], abs=1e-4, nan_ok=True
            )


@pytest.mark.parametrize("case", list(UNEVEN))
def test_every_row_is_read_once(tmp_path, case):
    data = write_uneven(tmp_path / "data", UNEVEN[case])
    seen = run_ranks(read_rows_job, 3, options(data, tmp_path), str(data), 0, None)
    files = pa.concat_tables([pq.read_table(path) for path in sorted((data / "train").glob("*.parquet"))]).to_pydict()
    names = [feature.name for feature in FEATURES]
    columns = [[tuple(v) if isinstance(v, list) else (v,) for v in files[name]] for name in names]
    labels = [tuple(map(float, pair)) for pair in zip(files["click"], files["like"], strict=True)]
    assert sorted(row for rank in seen for row in rank) == sorted(zip(*columns, labels, strict=True))


def test_metrics_over_ranks_are_those_of_all_rows(tmp_path):
    """Logits of every rank put together by hand, and the metrics of one array of them."""
    data = write_uneven(tmp_path / "data", UNEVEN["sizes that have nothing in common"])
    parts = run_ranks(predictions_job, 3, options(data, tmp_path), str(data))
    found = parts[0][1]
    logits, labels, groups = (np.concatenate([part[0][index] for part in parts]) for index in range(3))
    assert len(logits) == 654 and len({len(part[0][0]) for part in parts}) > 1
    expected = evaluate_predictions(logits, labels, groups, ["click", "like"])
    for task in expected:
        for metric, value in expected[task].items():
            assert found["tasks"][task][metric] == pytest.approx(value, abs=1e-12), (task, metric)
