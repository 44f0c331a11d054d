"""A rank keeps few of many shards open, checks all of them, and keeps ids in as few bits as they need."""

import os
import shutil
import threading
from itertools import chain

import pyarrow.parquet as pq
import pytest
import torch

from ssr_rec.data import row_groups as blocks
from ssr_rec.data import shards
from ssr_rec.data.batch_order import Piece
from ssr_rec.data.row_groups import SplitFiles
from ssr_rec.data.schema import Schema
from tests.conftest import reseal, write_dataset
from tests.shard_edits import forget_group_rows, read_all, replace, rewrite


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Twelve shards of two row groups, the last one shorter, of which three may be open."""
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 40)
    monkeypatch.setattr(blocks, "OPEN_FILES", 3)
    folder = write_dataset(tmp_path / "many", {"train": 470, "validation": 8}, rows_in_group=20)
    assert len(Schema.read(folder).splits["train"].shards) == 12
    return folder


def open_shards(folder):
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(link.startswith(str(folder)) for link in links)


def test_few_of_many_shards_are_open_and_read_as_if_all_were(many, monkeypatch):
    schema = Schema.read(many)
    files = SplitFiles(many, schema, "train")
    assert open_shards(many) == 0
    rows = pq.read_table([many / shard.path for shard in schema.splits["train"].shards]).to_pydict()
    # Back and forth, so that shards are opened again.
    for group in [*range(24), 0, 23, 11, 12, 0]:
        first, count = 20 * group, int(files.group_rows[group])
        assert count == (10 if group == 23 else 20)
        block = files.read(Piece(group, 0, count), None)
        assert block.scalars[0].tolist() == rows["user"][first : first + count]
        assert block.lists[0].ids.tolist() == list(chain(*rows["history"][first : first + count]))
        assert files.locate(group) == (group // 2, group % 2, 20 * (group % 2))
        assert open_shards(many) <= 3
    few = [batch.sparse.values().tolist() for batch in read_all(many)]
    monkeypatch.setattr(blocks, "OPEN_FILES", 100)
    assert [batch.sparse.values().tolist() for batch in read_all(many)] == few
    forget_group_rows(many)
    monkeypatch.setattr(blocks, "OPEN_FILES", 3)
    assert [batch.sparse.values().tolist() for batch in read_all(many)] == few
    # The last batch is here before the reader's threads let go of their files.
    for thread in threading.enumerate():
        if thread.name.startswith("ssr_rec-"):
            thread.join(10)
    assert open_shards(many) <= 3


def test_the_shard_that_was_not_read_for_longest_is_closed(many, monkeypatch):
    opened, open_one = [], SplitFiles._open
    monkeypatch.setattr(
        SplitFiles, "_open", lambda self, path, shard: opened.append(path.name) or open_one(self, path, shard)
    )
    files = SplitFiles(many, Schema.read(many), "train")
    for shard in (0, 1, 2, 0, 3, 0, 4, 0):
        files.read(Piece(2 * shard, 0, 20), None)
    assert opened == [f"0000{shard}.parquet" for shard in range(5)]


def test_a_shard_that_is_opened_late_is_checked_early_by_its_footer(many):
    schema, path = Schema.read(many), many / "train" / "00009.parquet"
    intact = path.read_bytes()
    shutil.copy(many / "train" / "00008.parquet", path)
    with pytest.raises(ValueError, match=r"train/00009.parquet: damaged, or not the file that was written"):
        SplitFiles(many, schema, "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train/00009.parquet: no such shard"):
        SplitFiles(many, schema, "train")
    path.write_bytes(intact)
    files = SplitFiles(many, schema, "train")
    # Between that check and its first use.
    shutil.copy(many / "train" / "00008.parquet", path)
    with pytest.raises(ValueError, match=r"train/00009.parquet: damaged, or not the file that was written"):
        files.read(Piece(18, 0, 20), None)


def test_shard_opened_late_whose_content_is_not_what_the_schema_says(many):
    path = many / "train" / "00009.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["item"]), path, row_group_size=20)
    reseal(many)
    files = SplitFiles(many, Schema.read(many), "train")
    with pytest.raises(ValueError, match=r"train/00009.parquet: column 'item' is missing"):
        files.read(Piece(18, 0, 20), None)
    pq.write_table(table, path, row_group_size=25)
    reseal(many)
    files = SplitFiles(many, Schema.read(many), "train")
    with pytest.raises(ValueError, match=r"train/00009.parquet: its row groups are not of 20 rows"):
        files.read(Piece(18, 0, 20), None)


@pytest.mark.parametrize("name", ["item", "history"])
def test_an_id_that_would_wrap_in_32_bits_is_refused(copy, name):
    """Ids are kept in 32 bits where tables are small: 2**32 + 1 must not become 1."""

    def change(table):
        values = table[name].to_pylist()
        values[70] = 2**32 + 1 if name == "item" else [2**32 + 1]
        return replace(table, name, values)

    rewrite(copy, change)
    with pytest.raises(ValueError, match=rf"column '{name}' holds id 4294967297 at its row 6, its table has rows 0 to"):
        read_all(copy)


def test_ids_beyond_32_bits_are_read_as_they_are(copy):
    schema = Schema.read(copy)
    features = [f.model_copy(update={"num_embeddings": 2**33}) for f in schema.features]
    schema.model_copy(update={"features": features}).write(copy)

    def change(table):
        table = replace(table, "item", [value + 2**32 for value in table["item"].to_pylist()])
        return replace(table, "history", [[i + 2**32 for i in items] for items in table["history"].to_pylist()])

    small = read_all(copy)
    rewrite(copy, change)
    for before, after in zip(small, read_all(copy), strict=True):
        for name in ("user", "item", "history"):
            shift = 0 if name == "user" else 2**32
            assert torch.equal(after.sparse[name].values(), before.sparse[name].values() + shift)
            assert torch.equal(after.sparse[name].lengths(), before.sparse[name].lengths())
