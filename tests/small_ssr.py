"""A small SSR and its inputs, for the tests of SSR."""

from typing import Any

import torch
from torch import Tensor

from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig

F, D, B, V, DV, L = 5, 4, 6, 3, 8, 2
SMALL: dict[str, Any] = {"filter": "dynamic", "num_views": V, "view_dim": DV, "num_layers": L}
STATIC: dict[str, Any] = {**SMALL, "filter": "static"}


def build(seed: int = 0, **settings: Any) -> SSR:
    """An SSR in float64 whose every parameter is random, so that no default of 0 or 1 hides a mistake."""
    torch.manual_seed(seed)
    ssr = SSR(F, D, 1, SSRConfig(**(SMALL | settings))).double().eval()
    with torch.no_grad():
        for parameter in ssr.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.2)
    return ssr


def batch(rows: int = B, seed: int = 7) -> Tensor:
    return torch.randn(rows, F * D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
