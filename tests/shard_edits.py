"""Datasets changed after they were written, and what is read of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.conftest import reseal


def read_all(folder):
    return list(Reader(folder, Schema.read(folder), "train", 64, num_lanes=2).epoch(0))


def rewrite(folder, change):
    """Replace the training shard by ``change(table)``, keeping its metadata and row groups."""
    path = folder / "train" / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path, row_group_size=64)
    reseal(folder)


def replace(table, name, values, type_=None):
    index = table.schema.get_field_index(name)
    return table.set_column(index, name, pa.array(values, type=type_ or table.schema.field(name).type))


def forget_group_rows(folder):
    """As a schema of the time before they stood in it."""
    values = json.loads((folder / "schema.json").read_text())
    del values["checksum"]
    for split in values["splits"].values():
        for shard in split["shards"]:
            del shard["group_rows"]
    (folder / "schema.json").write_text(json.dumps(values))
