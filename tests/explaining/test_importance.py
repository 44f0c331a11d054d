"""Permutation importance: what is exchanged, the fast way against the plain one, the values against scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from ssr_rec.common.errors import UserError
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.importance import Scored, column_groups, permutation_importance
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.serving.trained_model import restore_model
from tests.made_run import make_run
from tests.sequence_log import write_sequence_log

DIN = "--sequences={clicked: {encoder: {name: din, hidden: [4]}, target: [item_id, kind_id]}}"
MODELS = {
    "ssr": ["--over_arch.num_views=2", "--over_arch.view_dim=8"],
    "deepfm": ["--over_arch.name=deepfm", "--over_arch.hidden=[8]"],
    "bf16": ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--train.bf16=true"],
}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return write_sequence_log(tmp_path_factory.mktemp("log") / "data", {"train": 64, "validation": 64, "test": 700})


def columns_of(rows: SplitRows) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in rows.schema.feature_names}
    for batch in rows.batches(130):
        for name in found:
            found[name] += [tuple(ids.tolist()) for ids in batch.sparse[name].to_dense()]
    return found


def test_only_the_named_columns_move_and_each_row_gets_another_rows(log):
    schema = Schema.read(log)
    rows = SplitRows.read(log, schema, "test", 300)
    order = np.random.default_rng(0).permutation(300)
    before, after = columns_of(rows), columns_of(rows.exchanged(["kind_id", "tags"], order))
    for name, values in before.items():
        assert len(values) == 300
        assert after[name] == ([values[i] for i in order] if name in ("kind_id", "tags") else values)
    assert before["tags"] != after["tags"]


@pytest.mark.parametrize("kind", MODELS)
def test_the_fast_way_scores_what_the_whole_model_does(kind, log, tmp_path):
    restored = restore_model(make_run(tmp_path / "run", log, [*MODELS[kind], "--embeddings.dim=8", DIN]))
    rows = SplitRows.read(log, restored.schema, "test")
    scored = Scored(restored.model, rows)
    order = np.random.default_rng(1).permutation(700)
    fast = 0
    for columns in (
        ["user"],
        ["tags"],
        ["viewed", "user"],
        ["item_id"],
        ["clicked_item", "clicked_kind", "clicked_age"],
    ):
        plain = rows.exchanged(columns, order).logits(restored.model)
        np.testing.assert_array_equal(scored.exchanged(columns, order), plain)
        assert np.abs(plain - scored.logits).max() > 1e-3
        fast += set(columns) <= set(scored._fields)
    assert fast == 3


def test_values_are_scikit_learns_and_ranked(log, tmp_path):
    restored = restore_model(make_run(tmp_path / "run", log, [*MODELS["ssr"], "--embeddings.dim=8", DIN]))
    rows = SplitRows.read(log, restored.schema, "test")
    groups = column_groups(restored.schema, {"who": ["user", "tags"]})
    assert set(groups) == {"user", "item_id", "tags", "kind_id", "viewed", "clicked (all columns)", "who"}
    found = permutation_importance(restored.model, rows, groups, [0, 7])
    assert [one.total for one in found] == sorted((one.total for one in found), reverse=True)
    who, labels = next(one for one in found if one.name == "who"), rows.block.labels[:, 0]

    def measured(logits: np.ndarray) -> tuple[float, float]:
        return roc_auc_score(labels, logits[:, 0]), log_loss(labels, 1 / (1 + np.exp(-logits[:, 0].astype(float))))

    base = measured(rows.logits(restored.model))
    for at, seed in enumerate((0, 7)):
        order = np.random.default_rng((seed, list(groups).index("who"))).permutation(700)
        here = measured(rows.exchanged(["user", "tags"], order).logits(restored.model))
        assert who.auc["click"][at] == pytest.approx(base[0] - here[0])
        assert who.logloss["click"][at] == pytest.approx(here[1] - base[1])
    assert who.mean("auc", "click") == pytest.approx(np.mean(who.auc["click"]))


def test_groups_that_cannot_be_are_refused(log):
    schema = Schema.read(log)
    for groups, said in (
        ({"user": ["tags"]}, "feature or sequence of that name"),
        ({"a": ["tag"]}, "no feature 'tag'"),
        ({"a": ["clicked_item", "user"]}, "must stay whole; name all of clicked_age, clicked_kind, clicked_item"),
    ):
        with pytest.raises(UserError, match=said):
            column_groups(schema, groups)
