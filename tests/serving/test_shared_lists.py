"""Rows that share lists score as rows with their own copies, are joined with others, and count alike."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.serving.graph import ServingModel, make_layout, stacked_tables
from ssr_rec.serving.raw_rows import Encoded
from ssr_rec.serving.server_batcher import _joined
from ssr_rec.serving.shared_lists import events_of_rows, flat
from ssr_rec.serving.trained_model import build_plain_model
from ssr_rec.serving.value_shares import ValueShares
from tests.made_run import randomised
from tests.model.test_sequence_models import ENCODERS, config_of
from tests.sequence_log import write_sequence_log


def drawn(rows: int, groups: int | None, seed: int) -> Encoded:
    """One single-valued and two list features; the rows share the lists of the first one, if ``groups`` says so."""
    rng = np.random.default_rng(seed)
    lists = []
    for count in (groups or rows, rows):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, count))])
        lists.append((rng.integers(0, 5, offsets[-1]), offsets))
    return Encoded(rng.integers(0, 5, (1, rows)), lists, [rng.integers(0, groups, rows) if groups else None, None])


def plain(encoded: Encoded) -> list[Any]:
    """The rows, one by one."""
    found: list[Any] = encoded.ids[0].tolist()
    for (values, offsets), of_rows in zip(encoded.lists, encoded.of_rows, strict=True):
        cut = [values[a:b].tolist() for a, b in pairwise(offsets)]
        own = range(encoded.rows) if of_rows is None else of_rows
        found = [(row, cut[k]) for row, k in zip(found, own, strict=True)]
    return found


def test_copies_and_joined_requests_have_the_rows_that_they_were_made_of() -> None:
    parts = [drawn(5, 2, 0), drawn(3, None, 1), drawn(4, 3, 2), drawn(0, 1, 3)]
    for part in parts:
        same = flat(part)
        assert plain(same) == plain(part) and same.of_rows == [None, None]
        (values, offsets), wanted = part.lists[0], same.lists[0]
        assert values[events_of_rows(offsets, part.of_rows[0])].tolist() == wanted[0].tolist()
        assert np.array_equal(events_of_rows(wanted[1], None), np.arange(wanted[1][-1]))
    assert plain(_joined(parts)) == [row for part in parts for row in plain(part)]
    assert _joined(parts).of_rows[1] is None and len(_joined(parts).lists[0][1]) == 1 + 2 + 3 + 3 + 1


def test_shared_values_count_once_a_row() -> None:
    encoding = Drawn(column="x")
    features = [
        Feature(name="a", kind="categorical", num_embeddings=5, encoding=encoding),
        *(Feature(name=name, kind="list", num_embeddings=5, encoding=encoding, max_length=4) for name in "bc"),
    ]
    shared, copied = (ValueShares(features, {}) for _ in range(2))
    for one in (shared, copied):
        one._list_special = [(0, 1), (2, 3)]
    shared.add(*drawn(50, 4, 0)[:3])
    copied.add(*flat(drawn(50, 4, 0))[:3])
    assert shared.counts() == copied.counts() and shared.counts()["b"].oov > 5


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_that_share_a_history_score_as_with_copies_of_it(tmp_path: Path, encoder: str) -> None:
    """Four histories, one of them empty, of thirty rows in any order."""
    folder = write_sequence_log(tmp_path / "log", {"train": 60, "validation": 30, "test": 30})
    schema = Schema.read(folder)
    model = randomised(build_plain_model(config_of(encoder), schema), 3)
    layout = make_layout(schema, model.dense, "mean", "fp32")
    tables = list(stacked_tables(model, schema, layout).values())
    served = ServingModel(model.dense, layout, False).eval()
    batch = next(iter(Reader(folder, schema, "test", batch_size=30).epoch(0)))
    rng = np.random.default_rng(0)
    of_rows = rng.integers(0, 4, 30)
    (history,) = model.dense.histories.histories  # type: ignore[union-attr]
    lengths, columns = np.array([6, 0, 3, 1]), {f.name for f in history.columns}
    singles, lists, sharing = [], [], []
    for feature in schema.features:
        ids = batch.sparse[feature.name]
        if feature.kind != "list":
            singles.append(ids.values().numpy())
            continue
        own = lengths if feature.name in columns else rng.integers(0, 6, 4)
        lists.append((rng.integers(0, feature.num_embeddings, own.sum()), np.concatenate([[0], np.cumsum(own)])))
        sharing.append(of_rows)
    shared = Encoded(np.stack(singles), lists, list(sharing))
    at = [f.name for f in schema.features if f.kind == "list"].index(history.columns[0].name)

    def score(encoded: Encoded) -> torch.Tensor:
        rows = [np.arange(encoded.rows) if one is None else one for one in encoded.of_rows]
        events = events_of_rows(encoded.lists[at][1], encoded.of_rows[at])
        flattened = [torch.from_numpy(array) for one in encoded.lists for array in one]
        given = [torch.from_numpy(array) for array in [*rows, events]]
        with torch.no_grad():
            return served(torch.from_numpy(encoded.ids), flattened, given, tables)

    wanted = score(flat(shared))
    assert wanted.std() > 1e-2
    torch.testing.assert_close(score(shared), wanted, atol=1e-6, rtol=1e-6)
