"""Files that are not what their schema says are refused, each with the file, the column and the row."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.batch_order import Piece
from ssr_rec.data.row_groups import SplitFiles
from ssr_rec.data.schema import Schema
from ssr_rec.data.shards import arrow_schema, write_shards
from tests.conftest import draw_rows, reseal, write_dataset
from tests.shard_edits import forget_group_rows, read_all, replace, rewrite


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def test_truncated_file(copy):
    path = copy / "train" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train/00000.parquet: not a readable parquet file"):
        read_all(copy)


def test_damaged_row_group(copy):
    path = copy / "train" / "00000.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000.parquet: row group \d+ is damaged"):
        read_all(copy)


def test_missing_shard(copy):
    (copy / "train" / "00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"00000.parquet: no such shard"):
        read_all(copy)


def test_shard_of_another_dataset(copy, tmp_path):
    other = write_dataset(tmp_path / "other", {"train": 1_003, "validation": 9, "test": 9}, rows_in_group=64, seed=1)
    shutil.copy(other / "train" / "00000.parquet", copy / "train" / "00000.parquet")
    with pytest.raises(ValueError, match=r"00000.parquet: damaged, or not the file that was written in its place"):
        read_all(copy)
    reseal(copy)
    with pytest.raises(ValueError, match="dataset id tiny-1, the schema's is tiny-0"):
        read_all(copy)


def test_rows_missing(copy):
    rewrite(copy, lambda table: table.slice(0, 900))
    with pytest.raises(ValueError, match="900 rows, the schema says 1003"):
        read_all(copy)


def test_column_missing(copy):
    rewrite(copy, lambda table: table.drop_columns(["price"]))
    with pytest.raises(ValueError, match="column 'price' is missing"):
        read_all(copy)


def test_list_where_a_scalar_was_declared(copy):
    rewrite(copy, lambda t: replace(t, "price", [[i] for i in t["price"].to_pylist()], pa.list_(pa.int64())))
    with pytest.raises(ValueError, match=r"column 'price' holds list<.*>, the schema says int64"):
        read_all(copy)


def test_scalar_where_a_list_was_declared(copy):
    rewrite(copy, lambda t: replace(t, "tags", [1] * len(t), pa.int64()))
    with pytest.raises(ValueError, match="column 'tags' holds int64, the schema says list<"):
        read_all(copy)


@pytest.mark.parametrize("bad", [8, -1, 2**40])
def test_id_out_of_range(copy, bad):
    def change(table):
        ids = table["price"].to_pylist()
        ids[70] = bad
        return replace(table, "price", ids)

    rewrite(copy, change)
    with pytest.raises(ValueError, match=rf"from row 64\): column 'price' holds id {bad} at its row 6"):
        read_all(copy)


def test_id_out_of_range_in_a_list(copy):
    def change(table):
        ids = table["tags"].to_pylist()
        ids[3] = [0, 12]
        return replace(table, "tags", ids)

    rewrite(copy, change)
    with pytest.raises(ValueError, match="column 'tags' holds id 12 at its row 3"):
        read_all(copy)


@pytest.mark.parametrize("bad", [2, -1])
def test_label_not_binary(copy, bad):
    def change(table):
        labels = table["like"].to_pylist()
        labels[100] = bad
        return replace(table, "like", labels)

    rewrite(copy, change)
    with pytest.raises(ValueError, match=f"label 'like' is {bad} in row 100, must be 0 or 1"):
        read_all(copy)


def test_list_that_is_too_long(copy):
    def change(table):
        ids = table["history"].to_pylist()
        ids[66] = [1] * 5
        return replace(table, "history", ids)

    rewrite(copy, change)
    message = r"from row 64\): column 'history' holds 5 ids at its row 2, its max_length is 4"
    with pytest.raises(ValueError, match=message):
        read_all(copy)


def test_null_in_a_list(copy):
    def change(table):
        ids = table["tags"].to_pylist()
        ids[3] = [0, None]
        return replace(table, "tags", ids)

    rewrite(copy, change)
    with pytest.raises(ValueError, match="column 'tags' holds a null in a list"):
        read_all(copy)


def test_column_given_twice(copy):
    rewrite(copy, lambda table: table.append_column("price", table["price"]))
    with pytest.raises(ValueError, match="column 'price' is given twice"):
        read_all(copy)


def test_null(copy):
    def change(table):
        ids = table["user"].to_pylist()
        ids[5] = None
        return table.set_column(0, pa.field("user", pa.int64(), nullable=True), pa.array(ids))

    rewrite(copy, change)
    with pytest.raises(ValueError, match="column 'user' is null at its row 5"):
        read_all(copy)


def test_empty_and_unknown_split(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": 10, "validation": 0, "test": 5}, rows_in_group=8)
    schema = Schema.read(folder)
    with pytest.raises(ValueError, match="split 'validation' is empty"):
        SplitFiles(folder, schema, "validation")
    with pytest.raises(ValueError, match="no split 'tset'"):
        SplitFiles(folder, schema, "tset")


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_shard_that_is_no_file(copy, put):
    (copy / "train" / "00000.parquet").unlink()
    put(copy / "train" / "00000.parquet")
    with pytest.raises(ValueError, match=r"train/00000.parquet: not a readable parquet file \(not a regular file\)"):
        read_all(copy)


def test_shards_in_each_others_place(tmp_path):
    """Equal sizes and the same dataset: only the footer says which is which."""
    folder = write_dataset(tmp_path / "d", {"train": 40, "validation": 40, "test": 40}, rows_in_group=64)
    shutil.copy(folder / "validation" / "00000.parquet", folder / "test" / "00000.parquet")
    files = SplitFiles(folder, Schema.read(folder), "validation")
    assert files.group_rows.tolist() == [40]
    with pytest.raises(ValueError, match=r"test/00000.parquet: damaged, or not the file that was written in its place"):
        SplitFiles(folder, Schema.read(folder), "test")


def test_equal_rows_have_unequal_footers(tmp_path):
    """Else two shards of the same sizes and extremes could change places unnoticed."""
    rows = draw_rows(40, np.random.default_rng(0))
    columns = arrow_schema(Schema.read(write_dataset(tmp_path / "d", {"train": 8}, rows_in_group=8)))
    shards = [write_shards([rows], columns, tmp_path, split, 64)[0] for split in ("train", "test")]
    assert shards[0].footer != shards[1].footer


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_read(tmp_path):
    """Of the pages every 9th byte, and of the bytes before the pages of the lists, which no checksum covers, all."""
    folder = write_dataset(tmp_path / "d", {"train": 64}, rows_in_group=64)
    path, schema = folder / "train" / "00000.parquet", Schema.read(folder)
    intact, columns = path.read_bytes(), pq.read_metadata(path).row_group(0)
    starts = [columns.column(schema.feature_names.index(name)).data_page_offset for name in ("history", "tags")]
    headers = [at for start in starts for at in range(start, start + 24)]
    footer = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")

    def read():
        block = SplitFiles(folder, schema, "train").read(Piece(0, 0, 64), None)
        lists = [[part.tolist() for part in found[:3]] for found in block.lists]
        assert all(found.weights is None for found in block.lists)
        return block.scalars.tolist(), lists, block.labels.tolist(), block.group_ids.tolist()

    expected, refusals = read(), []
    for at in {*range(4, footer, 9), *headers}:
        for bit in range(8) if at in headers else (at % 8,):
            data = bytearray(intact)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            try:
                assert read() == expected, f"bit {bit} of byte {at}"
            except ValueError as error:
                refusals.append(str(error))
    assert all(str(path) in refusal for refusal in refusals)
    for reason in ("CRC", "lacks ids"):
        assert any(reason in refusal for refusal in refusals)


def test_footer_that_contradicts_itself(copy):
    """A column has its name in the footer's schema and again in each row group."""
    path = copy / "train" / "00000.parquet"
    data = path.read_bytes()
    where = data.rindex(b"history")
    while b"element" not in data[where : where + 30]:
        where = data.rindex(b"history", 0, where)
    path.write_bytes(data[:where] + b"mystery" + data[where + 7 :])
    reseal(copy)
    with pytest.raises(ValueError, match=r"00000.parquet: row group \d+ .*damaged, column 'history' lacks ids"):
        read_all(copy)


def edit_group_rows(path, group, rows):
    """Let the footer give a row group other rows, and nothing else; thrift writes n < 64 as the byte 2 n."""
    intact = path.read_bytes()

    def all_rows(data):
        metadata = pq.read_metadata(pa.BufferReader(data))
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    wanted = all_rows(intact)
    old, wanted[group] = wanted[group], rows
    for at in range(len(intact) - 8 - int.from_bytes(intact[-8:-4], "little"), len(intact) - 8):
        if intact[at] == 2 * old:
            data = intact[:at] + bytes([2 * rows]) + intact[at + 1 :]
            try:
                if all_rows(data) == wanted:
                    return path.write_bytes(data)
            except (OSError, pa.ArrowInvalid):
                continue
    raise AssertionError("no such place in the footer")


def test_footer_whose_row_groups_have_other_rows_than_it_says(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": 50}, rows_in_group=20)
    path = folder / "train" / "00000.parquet"
    edit_group_rows(path, 2, 9)
    reseal(folder)
    with pytest.raises(ValueError, match=r"00000.parquet: .*rows, the schema says 50"):
        SplitFiles(folder, Schema.read(folder), "train")
    edit_group_rows(path, 0, 21)
    reseal(folder)
    with pytest.raises(ValueError, match=r"00000.parquet: its row groups are not of 20 rows as the schema says"):
        SplitFiles(folder, Schema.read(folder), "train")
    forget_group_rows(folder)
    files = SplitFiles(folder, Schema.read(folder), "train")
    with pytest.raises(ValueError, match=r"row group 0 .*damaged"):
        files.read(Piece(0, 0, 21), None)


def test_shards_of_the_time_before_checksums_are_read(copy):
    expected = [batch.labels.tolist() for batch in read_all(copy)]
    values = json.loads((copy / "schema.json").read_text())
    del values["checksum"]
    for split in values["splits"].values():
        for shard in split["shards"]:
            del shard["footer"], shard["group_rows"]
    (copy / "schema.json").write_text(json.dumps(values))
    path = copy / "train" / "00000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=64)
    assert [batch.labels.tolist() for batch in read_all(copy)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"surprise": 1}, "surprise"),
        (lambda s: s | {"format_version": 9}, "format_version"),
        (lambda s: s | {"labels": ["user"]}, "more than once: user"),
        (lambda s: {k: v for k, v in s.items() if k != "features"}, "features"),
    ],
)
def test_broken_schema(copy, change, message):
    path = copy / "schema.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"schema.json: not a schema .*{message}"):
        Schema.read(copy)


def test_schema_that_is_not_json(copy):
    (copy / "schema.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"schema.json: not"):
        Schema.read(copy)
    with pytest.raises(ValueError, match="no such file; prepare the dataset"):
        Schema.read(copy / "nowhere")
