"""How well rows are mixed: a log in order of time, prepared and read, against a uniform shuffle (docs/scale.md)."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.reader import Reader

ROWS, BATCH = 40_000, 256
SPEC = {"name": "ordered", "labels": ["click"], "categorical": ["user"], "group_id": "row"}


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """Rows that know where they stood; read back as group ids."""
    folder = tmp_path_factory.mktemp("ordered")
    row = np.arange(ROWS)
    pq.write_table(pa.table({"row": row, "user": row // 1_000, "click": row % 2}), folder / "log.parquet")
    return folder / "out", prepare([str(folder / "log.parquet")], folder / "out", make_spec(SPEC, "test"))


def batches(ordered, epoch: int, lanes: int) -> list[np.ndarray]:
    """The places in the log of the rows of each full batch."""
    folder, schema = ordered
    reader = Reader(folder, schema, "train", BATCH, num_lanes=lanes, seed=5)
    return [batch.group_ids.numpy() for batch in reader.batches(epoch, 0) if len(batch.labels) == BATCH]


@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_of_an_ordered_log_are_like_draws_from_all_of_it(ordered, epoch):
    means = np.array([rows.mean() for rows in batches(ordered, epoch, lanes=4)]) / ROWS
    assert len(means) > 120
    # Of draws the variance is 1 / 12 a row; of about 125 batches it is known to a ninth.
    assert means.var() * 12 * BATCH == pytest.approx(1, abs=0.4)
    assert means.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    # Neighbours in the log are not neighbours in a batch.
    assert np.mean([(np.abs(np.diff(rows)) < 10).mean() for rows in batches(ordered, epoch, lanes=4)]) < 0.002


def meet_again(ordered, lanes: int) -> float:
    """How much more often than in a uniform shuffle two rows of a batch share one of the next epoch."""
    first, second = (batches(ordered, epoch, lanes) for epoch in (0, 1))
    batch_of = np.full(ROWS, -1)
    for number, rows in enumerate(second):
        batch_of[rows] = number
    again = sum(int((c * (c - 1)).sum()) for c in (np.bincount(batch_of[r][batch_of[r] >= 0]) for r in first))
    return again / (len(first) * BATCH * (BATCH - 1)) * len(second)


def test_rows_that_met_meet_again_as_often_as_promised(ordered):
    """1 + G / L^2 for G row groups and L lanes: eight groups of 4,096 rows here."""
    found = {lanes: meet_again(ordered, lanes) for lanes in (2, 4, 16)}
    for lanes, times in found.items():
        assert 0.95 < times < 1.1 * (1 + 8 / lanes**2), found
    assert found[2] > found[4] > found[16]
