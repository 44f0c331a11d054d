"""An id beyond its table is an error wherever it enters, never another id."""

import hashlib
import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.data.preparation.spec import MAX_BUCKETS, MAX_ITEMS
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.jobs import built_model
from tests.prepare_log import make_rows, run, spec_with, write_parquet
from tests.ranks import run_ranks

SMALL = ["--embeddings.dim=8", "--over_arch.num_views=2", "--over_arch.view_dim=8"]


def looked_up_job(overrides: list[str], dataset: str, ids: list[int]) -> list[str]:
    """What the tables of a model built for training say to ids of ``user``, which has 50."""
    tables = built_model([*SMALL, *overrides], dataset).module.model.tables
    schema, answers = Schema.read(dataset), []
    for wanted in ids:
        values = [[wanted if feature.name == "user" else 0] * 2 for feature in schema.features]
        sparse = KeyedJaggedTensor(
            keys=schema.feature_names,
            values=torch.tensor(list(itertools.chain(*values))),
            lengths=torch.ones(2 * len(values), dtype=torch.int64),
        )
        try:
            tables(sparse).wait().values()
            answers.append(f"taken for {sparse.values()[0]}")
        except RuntimeError:
            answers.append("refused")
    return answers


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_training_table_refuses_an_id_that_it_does_not_have(dataset, optimizer):
    found = run_ranks(
        looked_up_job, 1, [f"--embeddings.optimizer={optimizer}"], str(dataset), [49, 50, 2**31, 2**40 + 3, -1]
    )
    assert found == [["taken for 49", *["refused"] * 4]]


@pytest.mark.slow
def test_two_ranks_refuse_it_too(dataset):
    assert run_ranks(looked_up_job, 2, [], str(dataset), [2**33]) == [["refused"], ["refused"]]


def test_the_widest_hash_and_the_longest_list_fit(tmp_path):
    rows = make_rows(400)
    rows[5]["tags"] = list(range(40)) * 30
    spec = spec_with(hash_buckets={"uid": MAX_BUCKETS}, lists={"tags": {"max_length": MAX_ITEMS, "separator": "|"}})
    schema, splits = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec)
    wanted = {1 + int(hashlib.md5(str(row["uid"]).encode()).hexdigest(), 16) % MAX_BUCKETS for row in rows}
    ids = [row["uid"] for split in splits.values() for row in split]
    assert set(ids) == wanted and max(ids) > 2**30
    size = next(feature.num_embeddings for feature in schema.features if feature.name == "uid")
    assert size == 2**31 and pa.scalar(size - 1, pa.int32()).as_py() == size - 1
    assert max(len(row["tags"]) for split in splits.values() for row in split) == 1200
    with pytest.raises(ValueError, match="less than or equal to 4194304"):
        spec_with(lists={"tags": {"max_length": MAX_ITEMS + 1}})


@pytest.mark.parametrize("wrong", [50, -1, 2**62])
def test_the_reader_refuses_an_id_in_a_shard(dataset, tmp_path, wrong):
    schema = Schema.read(dataset)
    shard = schema.splits["test"].shards[0]
    table = pq.read_table(dataset / shard.path)
    ids = table["user"].to_pylist()
    ids[7] = wrong
    table = table.set_column(0, table.schema.field(0), pa.array(ids, pa.int64()))
    (tmp_path / shard.path).parent.mkdir(parents=True)
    pq.write_table(table, tmp_path / shard.path)
    bare = shard.model_copy(update={"footer": None, "group_rows": None})
    split = schema.splits["test"].model_copy(update={"shards": [bare], "num_rows": table.num_rows})
    reader = Reader(tmp_path, schema.model_copy(update={"splits": {"test": split}}), "test", 32)
    with pytest.raises(ValueError, match=rf"column 'user' holds id {wrong} at its row 7, its table has rows 0 to 49"):
        list(reader.batches(0, 0))
