"""The reader against pandas: every row once, values in their places, any number of ranks, any start."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch

from ssr_rec.data.reader import Prefetcher, Reader
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from tests.conftest import ROWS, write_dataset


def read(folder, rank=0, world_size=1, epoch=0, start_step=0, batch_size=128, seed=7, split="train", schema=None):
    schema = schema or Schema.read(folder)
    reader = Reader(folder, schema, split, batch_size, (rank, world_size), num_lanes=4, seed=seed).reading(prefetch=2)
    return list(reader.epoch(epoch, start_step))


def rows_of(batch) -> list[tuple]:
    """The batch row by row, through KeyedJaggedTensor's own accessors."""
    columns = {}
    for key in batch.sparse.keys():  # noqa: SIM118, it is no dict
        jagged = batch.sparse[key]
        columns[key] = [part.tolist() for part in torch.split(jagged.values(), jagged.lengths().tolist())]
    labels = batch.labels.tolist()
    groups = batch.group_ids.tolist()
    return [
        (groups[i], *(tuple(columns[key][i]) for key in batch.sparse.keys()), tuple(labels[i]))  # noqa: SIM118
        for i in range(len(labels))
    ]


def expected_rows(folder, split="train") -> list[tuple]:
    frame = pd.concat([pd.read_parquet(path) for path in sorted((folder / split).iterdir())])
    as_list = lambda value: tuple(value) if isinstance(value, (list, np.ndarray)) else (value,)  # noqa: E731
    features = Schema.read(folder).feature_names
    return [
        (row[GROUP_COLUMN], *(as_list(row[name]) for name in features), (float(row["click"]), float(row["like"])))
        for row in frame.to_dict("records")
    ]


def test_every_row_once_with_its_own_values(dataset):
    batches = read(dataset)
    assert [batch.global_rows for batch in batches] == [128] * 7 + [107]
    assert sorted(row for batch in batches for row in rows_of(batch)) == sorted(expected_rows(dataset))


def test_unshuffled_single_lane_is_the_stored_order(dataset):
    schema = Schema.read(dataset)
    reader = Reader(dataset, schema, "test", 64, num_lanes=1, seed=None)
    assert [row for batch in reader.epoch(0) for row in rows_of(batch)] == expected_rows(dataset, "test")


def test_the_order_is_the_one_that_earlier_runs_were_trained_in(dataset):
    """A run goes on by its step alone, so the rule may not change: one lane, by hand."""
    stored, size = expected_rows(dataset), 64
    for epoch in (0, 3):
        wanted = []
        for group in np.random.default_rng((7, epoch)).permutation(-(-len(stored) // size)):
            rows = stored[group * size : (group + 1) * size]
            wanted += [rows[i] for i in np.random.default_rng((7, epoch, group)).permutation(len(rows))]
        reader = Reader(dataset, Schema.read(dataset), "train", 64, num_lanes=1, seed=7)
        assert [row for batch in reader.epoch(epoch) for row in rows_of(batch)] == wanted


def test_keys_are_in_schema_order(dataset):
    assert read(dataset)[0].sparse.keys() == Schema.read(dataset).feature_names
    chosen = Schema.read(dataset).select(["tags", "user"], ["like"])
    batch = read(dataset, schema=chosen)[0]
    assert batch.sparse.keys() == ["tags", "user"] and batch.labels.shape == (128, 1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_read_the_batches_of_one(dataset, world_size):
    alone = read(dataset)
    ranks = [read(dataset, rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        together = [row for rank in ranks for row in rows_of(rank[step])]
        assert together == rows_of(batch)


def test_uneven_last_batch_may_leave_a_rank_without_rows(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": 130, "validation": 8, "test": 8}, rows_in_group=32)
    ranks = [read(folder, rank, 4) for rank in range(4)]
    last = [len(batches[-1].labels) for batches in ranks]
    assert [len(batches) for batches in ranks] == [2] * 4 and sum(last) == 2 and 0 in last
    empty = ranks[last.index(0)][-1]
    assert empty.sparse.stride() == 0 and empty.sparse.values().numel() == 0 and empty.global_rows == 2


def test_start_step_resumes_exactly(dataset):
    whole = [rows_of(batch) for batch in read(dataset, epoch=3)]
    for start in (1, 5, 7):
        assert [rows_of(batch) for batch in read(dataset, epoch=3, start_step=start)] == whole[start:]
    # A position is valid on another number of ranks too.
    ranks = [read(dataset, rank, 2, epoch=3, start_step=5) for rank in range(2)]
    assert [rows_of(a) + rows_of(b) for a, b in zip(*ranks, strict=True)] == whole[5:]


def test_shuffle_depends_on_seed_and_epoch_only(dataset):
    order = [rows_of(batch) for batch in read(dataset)]
    assert order == [rows_of(batch) for batch in read(dataset)]
    assert order != [rows_of(batch) for batch in read(dataset, epoch=1)]
    assert order != [rows_of(batch) for batch in read(dataset, seed=8)]


def test_shuffle_mixes_row_groups_and_rows(dataset):
    position = {row: index for index, row in enumerate(expected_rows(dataset))}
    first = np.array([position[row] for row in rows_of(read(dataset)[0])])
    assert len(set(first // 64)) >= 4, "a batch draws on one row group per lane"
    assert np.abs(np.diff(first)).min() >= 1 and (np.diff(first) == 1).mean() < 0.1


def test_batch_size_and_rows_must_serve_the_ranks(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"batch size 3 .* at least 4"):
        read(dataset, batch_size=3)
    folder = write_dataset(tmp_path / "d", {"train": 3, "validation": 3, "test": 3}, rows_in_group=32)
    with pytest.raises(ValueError, match="'train' has 3 rows for a world size of 4"):
        read(folder, world_size=4)


def test_prefetcher_passes_errors_on_and_can_be_closed_early(dataset):
    def failing():
        yield read(dataset)[0]
        raise ValueError("row 7 is bad")

    batches = Prefetcher(failing(), depth=1)
    next(batches)
    with pytest.raises(ValueError, match="row 7"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)

    def ending():
        yield read(dataset)[0]
        raise SystemExit

    batches = Prefetcher(ending(), depth=1)
    next(batches)
    with pytest.raises(RuntimeError, match="the reader's thread ended: SystemExit"):
        next(batches)
    reader = Reader(dataset, Schema.read(dataset), "train", 64, num_lanes=4).reading(prefetch=1)
    endless = reader.epoch(0)
    next(endless)
    endless.close()
    assert not endless._thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssr_rec-decoder")]


def test_memory_holds_a_few_row_groups_only(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": 40_000, "validation": 8, "test": 8}, rows_in_group=256)
    reader = Reader(folder, Schema.read(folder), "train", 64, num_lanes=4, seed=0).reading(prefetch=2)
    opened = []
    read_group = reader.files.read
    reader.files.read = lambda piece, order: opened.append(piece) or read_group(piece, order)
    batches = reader.epoch(0)
    for _ in range(10):
        next(batches)
    batches.close()
    assert len(opened) <= 4 * 2, f"{len(opened)} row groups opened for 10 batches and {ROWS} rows"
