"""The built-in presets: Ali-CCP rows written here, and the samples of Criteo and Avazu where they are at hand."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.presets import PRESETS
from ssr_rec.data.preparation.spec import make_spec, read_spec
from ssr_rec.data.schema import GROUP_COLUMN, SPLITS
from tests.prepare_log import ROOT, SHARED, Row, md5_id, run


def alibaba_line(sample: int, index: str, items: list[tuple[str, str, float]], labels: str) -> str:
    features = "\x01".join(f"{field}\x02{feature}\x03{value}" for field, feature, value in items)
    return f"{sample},{labels},{index},{len(items)},{features}\n"


def write_alibaba(folder: Path, part: str, samples: int, users: int) -> list[Row]:
    folder.mkdir(exist_ok=True)
    draw = random.Random(part)
    common: dict[str, Row] = {}
    with (folder / f"common_features_{part}.csv").open("w") as lines:
        for number in range(users):
            items = [("101", str(number), 1.0), ("124", str(number % 2), 1.0)]
            history = [str(draw.randrange(30)) for _ in range(draw.randrange(30))]
            items += [("109_14", feature, 2.5) for feature in history]
            draw.shuffle(items)
            user = {"101": str(number), "124": str(number % 2)}
            user["109_14"] = [feature for field, feature, _ in items if field == "109_14"]  # type: ignore[assignment]
            common[f"i{number}"] = user
            features = "\x01".join(f"{field}\x02{feature}\x03{value}" for field, feature, value in items)
            lines.write(f"i{number},{len(items)},{features}\n")
    rows = []
    with (folder / f"sample_skeleton_{part}.csv").open("w") as lines:
        for sample in range(samples):
            index = f"i{draw.randrange(users)}"
            click = draw.randrange(2)
            pay = draw.randrange(2) if click else 0
            item = str(draw.randrange(50))
            items = [("205", item, 1.0), ("301", "9", 1.0), ("2050", "trap", 1.0)]
            strength = draw.choice([None, 0.5, 4.0])
            if strength is not None:
                items.insert(draw.randrange(3), ("508", f"x{item}", strength))
            lines.write(alibaba_line(sample, index, items, f"{click},{pay}"))
            rows.append({**common[index], "click": click, "pay": pay, "205": item, "508_value": strength})
    return rows


@pytest.mark.slow
def test_alibaba_joins_and_parses_its_feature_lists(tmp_path: Path) -> None:
    rows = [*write_alibaba(tmp_path / "in", "test", 300, 20), *write_alibaba(tmp_path / "in", "train", 900, 40)]
    preset = PRESETS["alibaba"]
    spec = make_spec({**preset.spec.model_dump(), "hash_buckets": 2**20}, "test")
    schema, splits = run(tmp_path, [tmp_path / "in"], spec, read=preset.read)
    assert schema.labels == ["click", "pay"]
    found = Counter(
        (
            row["click"],
            row["pay"],
            row[GROUP_COLUMN],
            row["124"],
            row["205"],
            tuple(row["109_14"]),
            row["508_value"] > 0,
        )
        for split in SPLITS
        for row in splits[split]
    )
    assert found == Counter(
        (
            *(row["click"], row["pay"], int(row["101"]), md5_id(row["124"], 2**20), md5_id(row["205"], 2**20)),
            *(tuple(md5_id(item, 2**20) for item in row["109_14"][:20]), row["508_value"] is not None),
        )
        for row in rows
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("common_features_train.csv", ("i3,", "i4,"), "common_index is that of an earlier row"),
        ("common_features_train.csv", ("i3,", "j3,"), "common_index is not in the common_features file"),
        ("sample_skeleton_train.csv", (",3,", ",4,"), "feature_count is not the number of features"),
        ("sample_skeleton_train.csv", ("\n5,", "\n5,7,"), "row 6"),
    ],
)
def test_alibaba_refuses_files_that_do_not_fit(
    tmp_path: Path, file: str, change: tuple[str, str], message: str
) -> None:
    write_alibaba(tmp_path / "in", "train", 200, 5)
    path = tmp_path / "in" / file
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    preset = PRESETS["alibaba"]
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "in")], tmp_path / "out", preset.spec, read=preset.read)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_alibaba_needs_both_kinds_of_file(tmp_path: Path) -> None:
    write_alibaba(tmp_path / "in", "train", 200, 5)
    preset = PRESETS["alibaba"]
    with pytest.raises(ValueError, match=r"common_features_train\.csv is not among the inputs"):
        prepare([str(tmp_path / "in" / "sample_skeleton_train.csv")], tmp_path / "o", preset.spec, read=preset.read)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_criteo_sample(tmp_path: Path) -> None:
    source = SHARED / "criteo_small" / "train_first10k.tsv"
    schema, splits = run(tmp_path, [source], PRESETS["criteo"].spec)
    lines = [line.split("\t") for line in source.read_text().splitlines()]
    assert sum(split.num_rows for split in schema.splits.values()) == len(lines) == 10_000
    assert [feature.kind for feature in schema.features].count("numeric") == 13
    assert len(schema.features) == 39
    found = [row for split in SPLITS for row in splits[split]]
    assert sum(row["label"] for row in found) == sum(line[0] == "1" for line in lines)
    for column, name in ((1, "I1"), (14, "C1"), (39, "C26")):
        assert sum(row[name] == 0 for row in found) == sum(line[column] == "" for line in lines)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_avazu_sample(tmp_path: Path) -> None:
    preset = PRESETS["avazu"]
    schema, _ = run(tmp_path, [SHARED / "avazu_small"], preset.spec, read=preset.read)
    assert "id" not in schema.feature_names
    assert "hour" not in schema.feature_names
    assert len(schema.feature_names) == 23
    values = {}
    for name in ("hour_of_day", "weekday"):
        (feature,) = (feature for feature in schema.features if feature.name == name)
        values[name] = pq.read_table(tmp_path / "out" / feature.encoding.file)["value"].to_pylist()  # type: ignore[union-attr]
    # The sample is one hour, 2014-10-21 00:00, a Tuesday.
    assert values == {"hour_of_day": ["00"], "weekday": ["1"]}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
@pytest.mark.parametrize("name", ["kuairand", "ml1m_half"])
def test_shared_specs_name_every_column(name: str) -> None:
    spec = read_spec(ROOT / "configs" / "data" / f"{name}.yaml")
    file = next((SHARED / name).glob("*.parquet"))
    spec.check_columns(pq.read_schema(file).names, file)
