"""schema.json: its checksum, and entries that name files, sizes or columns no dataset has."""

import hashlib
import json
import time

import pytest

from ssr_rec.data.schema import Schema


@pytest.fixture
def folder(dataset, tmp_path):
    (tmp_path / "schema.json").write_text((dataset / "schema.json").read_text())
    return tmp_path


def change(folder, edit, checksum=None):
    """Edit the parsed schema.json; its checksum is left as it is, or becomes ``checksum(values)``."""
    path = folder / "schema.json"
    values = json.loads(path.read_text())
    stored = values.pop("checksum")
    edit(values)
    path.write_text(json.dumps({**values, "checksum": checksum(values) if checksum else stored}))


def test_a_changed_digit_is_noticed(folder):
    intact = Schema.read(folder)
    change(folder, lambda s: None)
    assert Schema.read(folder) == intact, "spaces and order of keys do not count"
    change(folder, lambda s: s["features"][0].update(num_embeddings=51))
    with pytest.raises(ValueError, match=r"schema.json: changed since it was written.*remove the checksum"):
        Schema.read(folder)


def test_the_checksum_is_of_the_sorted_content_and_may_be_missing(folder):
    def digest(values):
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    change(folder, lambda s: s["features"][0].update(num_embeddings=51), digest)
    assert Schema.read(folder).features[0].num_embeddings == 51
    path = folder / "schema.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps(values))
    assert Schema.read(folder).features[0].num_embeddings == 51


def test_written_and_read_it_is_the_same(folder, tmp_path):
    schema = Schema.read(folder).model_copy(update={"name": "naïve \U0001f600"})
    schema.write(tmp_path)
    assert Schema.read(tmp_path) == schema


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["splits"]["train"]["shards"][0].update(path="/etc/passwd"), "shards.0.path: .*within the dataset"),
        (lambda s: s["splits"]["test"]["shards"][0].update(path="a/../../b"), "shards.0.path: .*within the dataset"),
        (lambda s: s["splits"]["test"]["shards"][0].update(path="."), "shards.0.path: .*within the dataset"),
        (
            lambda s: s["splits"]["train"]["shards"].append({"path": "train/./00000.parquet", "num_rows": 0}),
            "than once",
        ),
        (lambda s: s["labels"].append("__group_id__"), "names used more than once: __group_id__"),
        (lambda s: s["splits"]["train"].update(num_rows=-1), "train.num_rows"),
        (lambda s: s["features"][0].update(num_embeddings=2**63), "features.0.num_embeddings: .*64 bits"),
        (lambda s: s["features"][0].update(num_embeddings=2**40 + 1), "num_embeddings: .* equal to 1099511627776"),
        (lambda s: s["preparation"].update(x=float("nan")), "preparation.x: nan"),
        (lambda s: s.update(name="a\0"), "name: the character"),
        (lambda s: s.update(name="a\nb", labels=["user"]), "more than once: user"),
    ],
)
def test_refused_entries(folder, edit, message):
    change(folder, edit)
    with pytest.raises(ValueError, match=rf"schema.json: not .*{message}") as refusal:
        Schema.read(folder)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", '{"name": 1, "name": 1}', "[" * 5_000])
def test_texts_that_are_no_schema(folder, text):
    (folder / "schema.json").write_text(text)
    with pytest.raises(ValueError, match=r"schema.json: not "):
        Schema.read(folder)


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "schema.json").mkdir()
    with pytest.raises(ValueError, match=r"schema.json: not a regular file"):
        Schema.read(tmp_path)


def test_many_features_take_no_time(folder):
    """Looking for repeated names once compared each with every other."""
    one = {"kind": "numeric", "num_embeddings": 4, "encoding": {"type": "drawn", "column": "x"}}
    values = json.loads((folder / "schema.json").read_text())
    del values["checksum"]
    values["features"] = [{"name": f"f{i}", **one} for i in range(20_000)]
    (folder / "schema.json").write_text(json.dumps(values))
    started = time.process_time()
    assert len(Schema.read(folder).features) == 20_000
    assert time.process_time() - started < 3


@pytest.mark.parametrize("place", ["features", "labels"])
def test_a_name_that_no_message_could_show_is_refused(dataset, place):
    values = Schema.read(dataset).model_dump(mode="json")
    long = "x" * 1001
    values[place][0] = {**values[place][0], "name": long} if place == "features" else long
    with pytest.raises(ValueError, match="at most 1000 characters"):
        Schema.model_validate(values)
