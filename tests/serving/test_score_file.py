"""A file of raw rows to a file of probabilities: the same as from memory, whole or not at all, bad files named."""

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.engines import EngineSettings
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.schema import SPLITS
from ssr_rec.serving.id_columns import write_columns
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.score_file import score_file
from tests.prepare_log import make_rows, read_split, spec_with, write_csv


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[Any, Any]]:
    """A raw CSV, a scorer whose probabilities are sums of ids, and those of the prepared rows by ``uid``."""
    folder = tmp_path_factory.mktemp("scored")
    raw = write_csv(make_rows(2_000), folder / "raw.csv")
    schema = prepare([str(raw)], folder / "prepared", spec_with(), settings=EngineSettings(threads=1))
    encoder = Encoder(schema, folder / "prepared")
    weights = np.arange(1.0, 5.0)[:, None]

    def predict(rows: Any, first_row: int) -> dict[str, np.ndarray]:
        ids, ((items, offsets),), *_ = encoder.encode(rows, first_row)
        of_list = np.add.reduceat(np.append(items, 0), offsets[:-1]) * (np.diff(offsets) > 0)
        return {"click": ((ids[[0, 1, 3]] * weights[:3]).sum(0) + 1e4 * of_list).astype(np.float32)}

    scorer = SimpleNamespace(schema=schema, encoder=encoder, predict=predict)
    wanted = {}
    for split in SPLITS:
        for row in read_split(folder / "prepared", schema, split):
            wanted[row["uid"]] = row["user"] + 2 * row["city"] + 3 * row["price"] + 1e4 * sum(row["tags"])
    return raw, scorer, wanted


def assert_scored(log: Any, target: Path) -> None:
    _, scorer, wanted = log
    found = pq.read_table(target)
    assert found.column_names == ["uid", "p_click"] and found.num_rows == 2_000
    uids = found["uid"].cast(pa.string()).to_pylist()
    assert uids == [str(number) for number in range(2_000)]
    ids = np.empty(len(uids), np.int64)
    place = [feature.name for feature in scorer.encoder.features].index("uid")
    write_columns([scorer.encoder.to_ids[place]], [uids], [ids])
    np.testing.assert_allclose(found["p_click"].to_numpy(), [wanted[one] for one in ids.tolist()], rtol=1e-6)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("rows_at_once", [300, 65_536])
def test_a_file_scores_as_its_prepared_rows(log, tmp_path, monkeypatch, form, rows_at_once):
    monkeypatch.setattr("ssr_rec.serving.score_file.ROWS_AT_ONCE", rows_at_once)
    source, progress = log[0], []
    if form == "csv.gz":
        source = tmp_path / "raw.csv.gz"
        source.write_bytes(gzip.compress(log[0].read_bytes()))
    if form == "parquet":
        source = tmp_path / "raw.parquet"
        pq.write_table(pa.Table.from_pylist(make_rows(2_000)), source)
    assert score_file(log[1], source, tmp_path / "out.parquet", ["uid"], progress.append) == 2_000
    assert_scored(log, tmp_path / "out.parquet")
    assert progress[-1] == 2_000 and progress == sorted(progress)
    if form == "parquet":
        assert len(progress) == -(-2_000 // rows_at_once)
    assert {path.name for path in tmp_path.iterdir()} <= {"out.parquet", source.name}


def test_a_bad_row_is_named_and_leaves_nothing(log, tmp_path, monkeypatch):
    monkeypatch.setattr("ssr_rec.serving.score_file.ROWS_AT_ONCE", 100)
    table = pa.Table.from_pylist(make_rows(500))
    price = table["price"].to_pylist()
    price[345] = float("inf")
    source = tmp_path / "bad.parquet"
    pq.write_table(table.set_column(table.column_names.index("price"), "price", pa.array(price)), source)
    (tmp_path / "out.parquet").write_text("old")
    with pytest.raises(ValueError, match=r"bad.parquet: row 345: feature 'price' holds the float inf"):
        score_file(log[1], source, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"bad.parquet", "out.parquet"}


HEADER = b"click,user,city,price,day,tags,uid\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1junkPAR1", "x.parquet: "),
        ("x.csv", b"", "x.csv: no rows at all, not even a header"),
        ("x.csv", b"a,b\n1,2\n", "x.csv: no column 'user'"),
        ("x.csv", HEADER + b"1,2,x,dear,d,1|2,7\n", "x.csv: row 1 .*: column 'price' must be a number"),
        ("x.csv", HEADER + b"1,2\n", "x.csv: row 1 .*: not the 7 columns of a row"),
        ("x.csv", HEADER + b"1,2,\xff\xfe,1,d,1|2,7\n", "x.csv: cannot be read, is it complete\\? 'utf-8"),
        ("x.csv.gz", b"click,user", "x.csv.gz: .*(gz|zlib)"),
        ("x.json", b"{}", "unknown kind of file"),
        ("x", b"", "unknown kind of file"),
    ],
)
def test_bad_files_are_named(log, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        score_file(log[1], tmp_path / name, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_without_rows_and_wrong_names(log, tmp_path):
    head = tmp_path / "head.csv"
    head.write_text("click,user,city,price,day,tags,uid\n")
    assert score_file(log[1], head, tmp_path / "a.parquet") == 0
    assert pq.read_table(tmp_path / "a.parquet").schema.field("p_click").type == pa.float32()
    pq.write_table(pa.Table.from_pylist(make_rows(3)).slice(0, 0), tmp_path / "none.parquet")
    assert score_file(log[1], tmp_path / "none.parquet", tmp_path / "b.parquet", ["uid"]) == 0
    with pytest.raises(ValueError, match="no such file"):
        score_file(log[1], tmp_path / "nowhere.csv", tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"the output is parquet"):
        score_file(log[1], head, tmp_path / "c.csv")
    with pytest.raises(ValueError, match="no column 'nope'"):
        score_file(log[1], head, tmp_path / "c.parquet", ["nope"])
