"""What SSR's filter does of each field, against plain loops."""

import pytest
import torch

from ssr_rec.explaining.filters import dynamic_view, static_view
from tests.small_ssr import SMALL, STATIC, D, F, V, batch, build

NAMES = [f"field{i}" for i in range(F)]
DIMS = [D] * F


def test_coverage_of_static_views_is_what_counting_gives():
    indices = build(**STATIC).blocks()[0].filter.indices
    found = static_view(indices, NAMES, DIMS)
    seen = [set(view.tolist()) for view in indices]
    for f, one in enumerate(found["fields"]):
        dims = range(f * D, (f + 1) * D)
        assert one["covered"] == pytest.approx(sum(any(d in view for view in seen) for d in dims) / D)
        assert one["views_per_dim"] == pytest.approx(sum(d in view for view in seen for d in dims) / D)
        assert one["blind_views"] == sum(not any(d in view for d in dims) for view in seen)
        assert [row[f] for row in found["heat"]] == [sum(d in view for d in dims) for view in seen]
    assert found["expected_covered"] == pytest.approx(1 - (1 - 8 / (F * D)) ** V)


@pytest.mark.parametrize(
    ("kind", "dims", "more"), [("dynamic", 8, {}), ("dynamic", 13, {"filter_dim": 13}), ("topk", 8, {"top_k": 3})]
)
def test_shares_of_survivors_are_what_a_loop_gives(kind, dims, more):
    first = build(**{**SMALL, "filter": kind, **more}).blocks()[0].filter
    x = batch(5)
    found = dynamic_view(first, x, NAMES, DIMS)
    kept = (first.sparse(x) if kind == "dynamic" else first(x)) != 0
    weight = first.proj.weight.detach()
    before = torch.zeros(F, dtype=x.dtype)
    after, alive = torch.zeros(V, F, dtype=x.dtype), torch.zeros(V)
    for row in range(5):
        for view in range(V):
            for dim in range(dims):
                w = weight[view * dims + dim]
                parts = torch.stack([(x[row, f * D : f * D + D] @ w[f * D : f * D + D]).abs() for f in range(F)])
                before += parts / parts.sum() / (5 * V * dims)
                if kept[row, view, dim]:
                    after[view] += parts / parts.sum()
                    alive[view] += 1
    assert 0 < alive.sum() < 5 * V * dims
    assert [one["before"] for one in found["fields"]] == pytest.approx(before.tolist())
    overall = (after.sum(0) / alive.sum()).tolist()
    assert [one["after"] for one in found["fields"]] == pytest.approx(overall)
    assert [one["lift"] for one in found["fields"]] == pytest.approx(
        [a / b for a, b in zip(overall, before.tolist(), strict=True)]
    )
    assert found["alive"] == pytest.approx((alive / (5 * dims)).tolist())
    assert found["dead_dims"] == [sum(not kept[:, v, j].any() for j in range(dims)) for v in range(V)]
