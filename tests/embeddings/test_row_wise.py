"""Row-wise sharding of un-pooled tables on CPU against plain indexing of whole tables."""

from __future__ import annotations

import pytest
import torch

from tests.embeddings.row_wise_job import BAGS, DIMS, RATE, ROWS, bags, gradient, row_wise_job, table
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("qcomms", "longest", "tolerance"),
    [
        ({}, 1, 0.0),
        pytest.param({}, 3, 1e-6, marks=pytest.mark.slow),
        pytest.param({"forward": "fp16", "backward": "fp16"}, 1, 2e-3, marks=pytest.mark.slow),
    ],
)
def test_rows_on_three_ranks_give_what_whole_tables_give(
    qcomms: dict[str, str], longest: int, tolerance: float
) -> None:
    """Ranks of unequal and no bags; empty bags; tables of two dims, whose rows do not divide by the ranks."""
    found = run_ranks(row_wise_job, len(BAGS), qcomms, longest)
    whole = {name: table(name) for name in ROWS}
    for rank, result in enumerate(found):
        assert set(result["kinds"].values()) == {"row_wise"}
        expected = torch.zeros(BAGS[rank], sum(DIMS.values()))
        change = gradient(rank) * RATE / len(BAGS)
        for name, ids, first in zip(ROWS, bags(rank, longest), (0, DIMS["item"]), strict=True):
            for bag, rows in enumerate(ids):
                for row in rows:
                    expected[bag, first : first + DIMS[name]] += table(name)[row]
                    whole[name][row] -= change[bag, first : first + DIMS[name]]
        out = torch.tensor(result["out"]).reshape(expected.shape)
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    held = dict.fromkeys(ROWS, 0)
    for result in found:
        for name, shards in result["after"].items():
            for first, rows in shards:
                held[name] += len(rows)
                expected = whole[name][first : first + len(rows)]
                torch.testing.assert_close(torch.tensor(rows), expected, atol=max(tolerance, 1e-6), rtol=0)
    assert held == ROWS
