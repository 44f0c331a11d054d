"""What is planned: tables files, overrides, worlds, mean lengths of a prepared log."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.planning.cases import mean_lengths, override_rows, parse_rows, parse_world, read_tables
from ssr_rec.planning.hardware import load_hardware
from tests.planning.small import make_case, make_schema, write_yaml


def test_a_tables_file_becomes_a_schema(tmp_path: Path) -> None:
    text = (
        "labels: [click, pay]\ntables:\n  - {name: user, rows: 1000000, dim: 32}\n"
        "  - {name: seen, rows: 5000, kind: list, mean_length: 7.5, repeat: 2}\n"
    )
    config, schema, lengths = read_tables(write_yaml(tmp_path, text), load_config(None, ["--embeddings.dim=8"]))
    assert [(f.name, f.kind, f.num_embeddings) for f in schema.features] == [
        ("user", "categorical", 1_000_000),
        ("seen_0", "list", 5000),
        ("seen_1", "list", 5000),
    ]
    assert [config.embeddings.dim_of(name) for name in schema.feature_names] == [32, 8, 8]
    assert lengths == {"user": 1.0, "seen_0": 7.5, "seen_1": 7.5}
    assert schema.labels == ["click", "pay"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: []\n", "tables: .*at least 1"),
        ("tables: [{name: a}]\n", r"tables.0.rows: Field required"),
        ("tables: [{name: a, rows: 0}]\n", r"tables.0.rows"),
        ("tables: [{name: a, rows: 3, size: 4}]\n", r"tables.0.size"),
        ("tables: [{name: a, rows: 3, mean_length: 4}]\n", "a: mean_length is of lists; add kind: list"),
        ("tables: [{name: a, rows: 3}, {name: a, rows: 4}]\n", "used more than once: a"),
        ("labels: []\ntables: [{name: a, rows: 3}]\n", "labels"),
    ],
)
def test_a_bad_tables_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_tables(write_yaml(tmp_path, text), load_config(None, []))
    assert "file.yaml" in str(error.value)


def test_rows_are_overridden_and_scaled() -> None:
    schema = make_schema({"user": 100, "item": 50, "hour": 24})
    rows = parse_rows(["user=2_000_000_000", "hour=25"])
    assert rows == {"user": 2_000_000_000, "hour": 25}
    changed = override_rows(schema, rows, 2.5)
    assert [f.num_embeddings for f in changed.features] == [2_000_000_000, 125, 25]
    assert [f.num_embeddings for f in schema.features] == [100, 50, 24]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["user"], "'user' is not understood"),
        (["user=many"], "write FEATURE=ROWS"),
        (["user=1", "user=2"], "names 'user' twice"),
        (["usr=5"], "names 'usr', which is no feature of 'small'; user is"),
        (["user=0"], "a table has 1 to"),
        (["user=9_999_999_999_999"], "a table has 1 to"),
    ],
)
def test_bad_rows_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override_rows(make_schema({"user": 100}), parse_rows(texts))


def test_rows_scaled_beyond_any_table_are_refused() -> None:
    with pytest.raises(ValueError, match="--scale-rows 1e\\+12: user would have"):
        override_rows(make_schema({"user": 100}), {}, 1e12)


def test_a_world_is_nodes_times_ranks() -> None:
    world = parse_world("16x8", load_hardware("a100_80g"))
    assert (world.nodes, world.per_node, world.size, str(world)) == (16, 8, 128, "16x8 a100_80g")
    for text, message in (
        ("16", "NODESxRANKS"),
        ("2x9", "has 8; use more nodes"),
        ("0x8", "at least one"),
        ("-1x8", "N"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_world(text, load_hardware("a100_80g"))
    with pytest.raises(ValueError, match="16,384 ranks"):
        parse_world("9999x8", load_hardware("a100_80g"))


def test_rows_of_a_rank_are_rounded_up() -> None:
    assert make_case({"a": 8}, ["--train.batch_size=1001"], nodes=2, per_node=8).rows_per_rank == 63


def test_mean_lengths_are_those_of_the_shards(dataset: Path) -> None:
    """Against counting the items; an empty list counts as one entry in a footer."""
    schema = Schema.read(dataset)
    found = mean_lengths(dataset, schema)
    assert set(found) == {"history", "tags"}
    table = pq.read_table(dataset / "train" / "00000.parquet").to_pydict()
    for name, mean in found.items():
        assert mean == pytest.approx(sum(max(1, len(ids)) for ids in table[name]) / len(table[name]))


def test_without_shards_lists_have_their_longest_length() -> None:
    assert mean_lengths(Path("nowhere"), make_schema({"user": 9, "seen": 9}, lists=("seen",))) == {"seen": 8.0}
