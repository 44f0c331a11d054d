"""Days added to a dataset: equal to having been there from the start; nothing half-added counts."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.split import whole_numbers
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.cases import one_quick, slow
from tests.prepare_log import ROOT, make_rows, md5_id, spec_with, write_csv, write_parquet
from tools.prepare_data import main

DAYS = [f"2024-01-{day:02d}" for day in range(1, 13)]
OLD, NEW = DAYS[:8], DAYS[8:]
ROWS = [row for row in make_rows(1500) if row["day"] in DAYS]
FULL = next(row for row in ROWS if row["tags"] and row["city"])
for number, row in enumerate(ROWS):
    if row["day"] in NEW:  # cities and tags come up, some on several days and first too seldom
        day = NEW.index(row["day"])
        row["city"] = row["city"] if number % 2 else f"new {number % 16 + 5 * day}"
        row["tags"] = row["tags"] and [tag + 5 * day for tag in row["tags"]]


def spec(**changes):
    return spec_with(split={"type": "days", "column": "day", "fit_days": 3}, **changes)


def log(folder: Path, days: list[str], name: str, rows=ROWS, write=write_parquet) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(write([row for row in rows if row["day"] in days], folder / name))


def made(tmp_path: Path, days: list[str], name: str, spread: bool = False, **options) -> Path:
    chosen = spec().model_copy(update={"spread_ids": spread})
    prepare([log(tmp_path / f"log_{name}", days, "a.parquet")], tmp_path / name, chosen, **options)
    return tmp_path / name


def shards(folder: Path) -> dict[str, list]:
    """Path -> the row groups of every shard, its columns as they are stored."""
    found = {}
    for split in Schema.read(folder).splits.values():
        for shard in split.shards:
            file = pq.ParquetFile(folder / shard.path)
            found[shard.path] = [file.read_row_group(group).to_pydict() for group in range(file.num_row_groups)]
    return found


@pytest.mark.parametrize(
    ("write", "batches"),
    [
        pytest.param(write_parquet, [NEW[:1], NEW[1:]], id="parquet"),
        pytest.param(write_csv, [NEW], id="csv", marks=pytest.mark.slow),
    ],
)
def test_added_days_are_as_if_they_had_been_there(tmp_path, write, batches):
    suffix = "csv" if write is write_csv else "parquet"
    prepare([log(tmp_path / "all", DAYS, f"a.{suffix}", write=write)], tmp_path / "whole", spec(), seed=5)
    prepare([log(tmp_path / "old", OLD, f"a.{suffix}", write=write)], tmp_path / "grown", spec(), seed=5)
    for number, days in enumerate(batches):
        schema = add([log(tmp_path / "new", days, f"{number}.{suffix}", write=write)], tmp_path / "grown")
        assert Schema.read(tmp_path / "grown") == schema
    whole, grown = Schema.read(tmp_path / "whole"), Schema.read(tmp_path / "grown")
    assert shards(tmp_path / "grown") == shards(tmp_path / "whole")
    assert grown.days == whole.days and grown.features == whole.features
    assert [split.positive_rate for split in grown.splits.values()] == [
        split.positive_rate for split in whole.splits.values()
    ]
    assert len(grown.additions) == len(batches) and grown.dataset_id != whole.dataset_id
    assert sorted(path.name for path in (tmp_path / "grown").iterdir()) == ["days", "schema.json", "vocabularies"]
    for day in DAYS:  # as the trainer reads them
        mine, other = (
            list(Reader(folder, schema, day, 16, seed=1).batches(0, 0))
            for folder, schema in ((tmp_path / "grown", grown), (tmp_path / "whole", whole))
        )
        assert all((a.sparse.values() == b.sparse.values()).all() for a, b in zip(mine, other, strict=True))


@pytest.mark.slow
def test_added_days_have_weights_tasks_and_numbers_also_where_a_task_has_no_row(tmp_path):
    rows = [{**row, "w": number % 3 / 2, "pay": number % 2, "like": None} for number, row in enumerate(ROWS)]
    for row in rows:
        row["like"] = row["click"] if row["day"] not in (NEW[1], NEW[2]) else None
    entries = {"labels": ["click", "pay", "like"], "weight": "w", "numeric": [], "dense": ["price"]}
    chosen = spec(**entries, tasks={"pay": {"where": "click = 1 and price >= 0"}, "like": {"missing": True}})
    for name, days in (("whole", DAYS), ("grown", OLD)):
        prepare([log(tmp_path / name / "log", days, "a.parquet", rows)], tmp_path / name / "data", chosen)
    for days in (NEW[:1], NEW[1:2], NEW[2:]):
        add([log(tmp_path / "more", days, "a.parquet", rows)], tmp_path / "grown" / "data")
    whole, grown = (Schema.read(tmp_path / name / "data") for name in ("whole", "grown"))
    assert shards(tmp_path / "grown" / "data") == shards(tmp_path / "whole" / "data")
    assert grown.dense == whole.dense and grown.splits[NEW[1]].counted["like"] == 0
    for day, split in whole.splits.items():
        assert (grown.splits[day].counted, grown.splits[day].positive_rate) == (split.counted, split.positive_rate)


@pytest.mark.parametrize("spread", one_quick(True, False))
def test_the_vocabulary_grows_day_by_day_and_old_ids_never_move(tmp_path, spread):
    folder = made(tmp_path, OLD, "log", spread)
    before = shards(folder)
    old = Schema.read(folder)
    add([log(tmp_path / "new", NEW, "b.parquet")], folder, extend=True)
    schema = Schema.read(folder)
    assert {path: rows for path, rows in shards(folder).items() if path in before} == before
    features = {feature.name: feature for feature in schema.features}
    by_hash = {md5_id(row["uid"], 2**30): row for row in ROWS}
    for name in ("user", "city", "tags"):

        def items(row, name=name):
            if name == "tags":
                return [str(tag) for tag in (row["tags"] or [])[:4]]
            return [] if row[name] is None else [str(row[name])]

        first = {feature.name: feature for feature in old.features}[name]
        ids = dict(pq.read_table(folder / first.encoding.file, columns=["value", "id"]).to_pandas().to_numpy())
        known = dict(ids)
        for day in NEW:
            size = 2 + len(ids)
            assert schema.new_from(day)[name] == size
            counts = Counter(item for row in ROWS if row["day"] == day for item in items(row))
            fresh = sorted((v for v, n in counts.items() if n >= 3 and v not in ids), key=lambda v: (-counts[v], v))
            ids |= {value: size + place for place, value in enumerate(fresh)}
            read = pq.ParquetFile(folder / schema.splits[day].shards[0].path).read().to_pylist()
            for row in read:
                wanted = [ids.get(item, 1) for item in items(by_hash[row["uid"]])]
                got = row[name] if name == "tags" else [row[name]] if row[name] else []
                assert got == wanted
        stored = pq.read_table(folder / features[name].encoding.file).to_pandas()
        assert dict(stored[["value", "id"]].to_numpy()) == ids and ids.items() >= known.items()
        assert features[name].num_embeddings == 2 + len(ids)
        assert len(ids) > len(known)
    assert schema.known_ids == {schema.dataset_id, old.dataset_id} and schema.same_tables_ids == {schema.dataset_id}


@pytest.mark.slow
def test_days_added_at_once_or_one_by_one_give_the_same_ids(tmp_path):
    once = made(tmp_path, OLD, "once")
    shutil.copytree(once, tmp_path / "each")
    add([log(tmp_path / "new", NEW, "b.parquet")], once, extend=True)
    for day in NEW:
        add([log(tmp_path / "new", [day], f"{day}.parquet")], tmp_path / "each", extend=True)
    assert shards(once) == shards(tmp_path / "each")
    one, each = Schema.read(once), Schema.read(tmp_path / "each")
    for a, b in zip(one.features, each.features, strict=True):
        assert a.num_embeddings == b.num_embeddings
        if a.encoding.type == "vocabulary":
            assert pq.read_table(once / a.encoding.file) == pq.read_table(tmp_path / "each" / b.encoding.file)
    for day in NEW:
        grows = {name: size for name, size in one.new_from(day).items() if each.new_from(day).get(name)}
        assert grows == each.new_from(day)
    # Every addition keeps the vocabularies of the one before it, for who reads the dataset meanwhile, and no others.
    assert len([path for path in (tmp_path / "each" / "vocabularies").iterdir() if path.is_dir()]) <= 4


def test_a_day_is_evaluated_without_the_ids_that_it_gave(tmp_path):
    folder = made(tmp_path, OLD, "log")
    add([log(tmp_path / "new", NEW, "b.parquet")], folder, extend=True)
    schema = Schema.read(folder).select(["city", "price", "tags", "user"], None)
    hidden = 0
    for day in NEW:
        sizes = schema.new_from(day)
        plain, served = (Reader(folder, schema, day, 16).reading(hide_new=hide).batches(0, 0) for hide in (False, True))
        for trained, evaluated in zip(plain, served, strict=True):
            for name in schema.feature_names:
                ids, seen = trained.sparse[name].values().numpy(), evaluated.sparse[name].values().numpy()
                limit = sizes.get(name, np.inf)
                assert (seen == np.where(ids >= limit, 1, ids)).all()
                hidden += int((seen != ids).sum())
    assert hidden > 100
    assert Reader(folder, schema, OLD[-1], 16).reading(hide_new=True).new_from == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**FULL, "day": OLD[-1]}], f"day {OLD[-1]} is in the dataset already; a day is added once, whole"),
        slow(([{**FULL, "day": "2023-12-31"}], f"day 2023-12-31 is not after its last, {OLD[-1]}")),
        ([{**FULL, "day": NEW[0], "user": "x7"}], "column 'user' holds string, the dataset was made from integer"),
        slow(([{**FULL, "day": NEW[0], "click": 2}], "column 'click' is 2.0; a label must be 0 or 1")),
        slow(([{**FULL, "day": "soon"}], "no day")),
        ([{**FULL, "day": "13.01.2024"}], r"'day' holds '13\.01\.2024', and such text does not sort by time"),
    ],
)
def test_rows_that_do_not_continue_the_dataset_are_refused(tmp_path, rows, message):
    folder = made(tmp_path, OLD, "log")
    before = (folder / "schema.json").read_bytes()
    if message == "no day":
        rows[0]["day"], message = "a/b", "which names no day"
    with pytest.raises(ValueError, match=message):
        add([str(write_parquet(rows, tmp_path / "b.parquet"))], folder)
    assert (folder / "schema.json").read_bytes() == before
    assert sorted(path.name for path in (folder / "days").iterdir()) == OLD
    assert not (folder / ".adding").exists()


def test_a_dataset_from_before_dates_with_the_year_last_were_refused_goes_on_with_them(tmp_path, monkeypatch):
    rows = [{**row, "day": f"{row['day'][-2:]}.01.2024"} for row in ROWS]
    days = [f"{day[-2:]}.01.2024" for day in DAYS]
    with monkeypatch.context() as before:
        before.setattr("ssr_rec.data.preparation.fit.whole_numbers", lambda rows, name, _: whole_numbers(rows, name))
        prepare([log(tmp_path / "old", days[:8], "a.parquet", rows)], tmp_path / "data", spec())
    assert add([log(tmp_path / "new", days[8:], "b.parquet", rows)], tmp_path / "data").days.names == days


@pytest.mark.parametrize("user", ["x7", "7.6"])
def test_text_that_was_whole_numbers_stays_so(tmp_path, user):
    folder = tmp_path / "data"
    prepare([log(tmp_path / "old", OLD, "a.csv", write=write_csv)], folder, spec())
    rows = [{**row, "user": user} for row in ROWS if row["day"] in NEW]
    with pytest.raises(ValueError, match="column 'user' held whole numbers alone so far"):
        add([log(tmp_path / "new", NEW, "b.csv", rows, write_csv)], folder)


def test_only_days_can_be_added(tmp_path):
    prepare([log(tmp_path / "old", OLD, "a.parquet")], tmp_path / "random", spec_with())
    new = log(tmp_path / "new", NEW, "b.parquet")
    with pytest.raises(ValueError, match=r"its splits are train, validation, test, not days\. New rows would belong"):
        add([new], tmp_path / "random")
    folder = made(tmp_path, OLD, "days")
    with pytest.raises(ValueError, match="made with preset table, not criteo"):
        add([new], folder, preset="criteo")
    values = json.loads((folder / "schema.json").read_text())
    del values["preparation"]["staged"], values["checksum"]
    (folder / "schema.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="made before there were additions"):
        add([new], folder)


@pytest.mark.slow
def test_a_second_addition_at_the_same_time_is_refused(tmp_path):
    folder = made(tmp_path, OLD, "log")
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    new = log(tmp_path / "new", NEW, "b.parquet")
    with pytest.raises(ValueError, match="another addition to it is going on"):
        add([new], folder)
    os.close(handle)
    add([new], folder)
    assert Schema.read(folder).days.names == DAYS


def test_the_command_line_adds(tmp_path, capsys):
    folder = made(tmp_path, OLD, "log")
    new = log(tmp_path / "new", NEW, "b.parquet")
    command = ["table", "--input", new, "--add-to", str(folder)]
    for wrong, message in (
        (["--min-count", "3"], "--min-count is settled by the dataset that --add-to names; leave it out"),
        (["--seed", "0"], "--seed is settled by the dataset"),
        (["--spread-ids"], "--spread-ids is settled by the dataset"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["table", "--input", new, "--add-to", str(tmp_path)]) == 2
    assert "no prepared dataset" in capsys.readouterr().err
    assert main([*command, "--extend-vocabulary"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["splits"]) == NEW and figures["rows"] == sum(row["day"] in NEW for row in ROWS)
    assert figures["dataset_id"] == Schema.read(folder).dataset_id
    assert main(["table", "--input", new, "--output", str(tmp_path / "x"), "--extend-vocabulary"]) == 2
    assert "--extend-vocabulary is for --add-to" in capsys.readouterr().err


def test_a_dataset_from_before_values_had_one_text_grows_only_where_that_changes_nothing(tmp_path):
    folder = made(tmp_path, OLD, "log")
    new = log(tmp_path / "new", NEW, "b.parquet")
    schema = json.loads((folder / "schema.json").read_text())
    del schema["checksum"], schema["preparation"]["values"]
    (folder / "schema.json").write_text(json.dumps(schema))
    shutil.copytree(folder, tmp_path / "odd")
    assert add([new], folder).days.names == DAYS
    path = tmp_path / "odd" / "vocabularies" / "city.parquet"
    table = pq.read_table(path)
    odd = ["24.0", *table["value"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, table.schema.field(0), [odd]), path)
    with pytest.raises(ValueError, match=r"column 'city' has '24\.0', which new rows could write differently"):
        add([new], tmp_path / "odd")


KILLED_AT = """
import os, signal, sys
from ssr_rec.data.preparation import append_days as module
steps = {"n": 0}
def counted(name, at):
    original = getattr(os, name)
    def call(*args, **kwargs):
        if str(args[0]).find(".adding") >= 0:
            steps["n"] += 1
            if steps["n"] == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
os.replace = counted("replace", int(sys.argv[3]))
module.add([sys.argv[1]], module.Path(sys.argv[2]), extend=True)
"""


@pytest.mark.faults
def test_killed_at_any_step_it_is_the_old_or_the_new_dataset(tmp_path):
    folder = made(tmp_path, OLD, "log")
    new = log(tmp_path / "new", NEW[:2], "b.parquet")
    shutil.copytree(folder, tmp_path / "undisturbed")
    add([new], tmp_path / "undisturbed", extend=True)
    wanted, before = shards(tmp_path / "undisturbed"), shards(folder)
    for step in (1, 2, 3, 4):  # two days, the vocabularies, the schema
        ended = subprocess.run([sys.executable, "-c", KILLED_AT, new, str(folder), str(step)], cwd=ROOT, check=False)
        assert ended.returncode == -signal.SIGKILL
        assert shards(folder) == before and Schema.read(folder).days.names == OLD
    assert (
        subprocess.run([sys.executable, "-c", KILLED_AT, new, str(folder), "5"], cwd=ROOT, check=False).returncode == 0
    )
    assert shards(folder) == wanted
    assert sorted(path.name for path in folder.iterdir()) == ["days", "schema.json", "vocabularies"]
    # What a killed addition left behind is gone with the next one, also of days that never came again.
    (folder / "days" / NEW[-1]).mkdir()
    add([log(tmp_path / "new", NEW[2:3], "c.parquet")], folder)
    assert sorted(path.name for path in (folder / "days").iterdir()) == DAYS[: len(OLD) + 3]
