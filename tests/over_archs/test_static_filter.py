"""The dims SSR-S's views see."""

import numpy as np
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.filters import FILTERS
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig
from tests.small_ssr import STATIC, D, F, batch, build


def indices(seed: int = 0, views: int = 6, dim: int = 12, layers: int = 3) -> list[np.ndarray]:
    settings = {"filter": "static", "num_views": views, "view_dim": dim, "num_layers": layers, "index_seed": seed}
    ssr = SSR(F, D, 1, SSRConfig(**settings))
    return [layer.filter.indices.numpy() for layer in ssr.blocks()]


def test_indices_are_distinct_in_a_view_and_differ_between_views_layers_and_seeds() -> None:
    per_layer = indices()
    for layer, rows in enumerate(per_layer):
        assert all(len(set(row)) == 12 for row in rows.tolist())
        assert len({tuple(row) for row in rows.tolist()}) == 6
        assert rows.min() >= 0 and rows.max() < (F * D if layer == 0 else 72)
    assert not np.array_equal(per_layer[1], per_layer[2])
    assert not np.array_equal(per_layer[0], indices(seed=1)[0])


def test_indices_ignore_the_global_generators_and_leave_them_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = indices()
    torch.manual_seed(2)
    np.random.seed(2)
    second = indices()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    FILTERS["static"](20, 0, SSRConfig(**STATIC))
    assert torch.equal(torch.rand(1), expected)


def test_more_views_keep_the_dims_of_the_first_ones() -> None:
    assert np.array_equal(indices(views=6)[0], indices(views=9)[0][:6])


def test_every_dim_is_equally_likely() -> None:
    views, dim, width = 2000, 5, F * D
    counts = np.bincount(indices(views=views, dim=dim, layers=1)[0].ravel(), minlength=width)
    expected = views * dim / width
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # Without replacement the variance is below the multinomial's, so the usual bound is generous; 19 degrees.
    assert chi_squared < 43.8


def test_a_view_of_the_whole_input_is_legal_and_one_dim_more_is_not() -> None:
    rows = indices(views=2, dim=F * D, layers=1)[0]
    assert np.array_equal(np.sort(rows, 1), np.tile(np.arange(F * D), (2, 1)))
    with pytest.raises(ValueError, match=r"view_dim=21 .* layer 0 .* at most 20"):
        indices(views=2, dim=F * D + 1, layers=1)


def test_loaded_indices_replace_the_seeded_ones() -> None:
    source, target, x = build(**STATIC), build(seed=1, **STATIC, index_seed=9), batch()
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def test_unselected_dims_are_blocked() -> None:
    settings = {"filter": "static", "num_views": 1, "view_dim": 3, "num_layers": 1}
    ssr, x = build(**settings), batch().requires_grad_()
    ssr(x).square().sum().backward()
    touched = set(x.grad.abs().sum(0).nonzero().flatten().tolist())
    assert touched == set(ssr.blocks()[0].filter.indices.flatten().tolist())


def test_a_view_wider_than_a_small_log_s_input_is_refused_with_the_keys_to_set() -> None:
    with pytest.raises(UserError, match=rf"--over_arch\.view_dim={F * D}, or --over_arch\.filter=dynamic"):
        indices(dim=F * D + 1)
