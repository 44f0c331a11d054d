"""Heads and towers against plain loops; the logits an over-arch adds; tables of an over-arch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.config.heads import HeadsConfig
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.tables import ConcatFields, build_tables, columns_per_dim
from ssr_rec.model.ctr_model import DenseArch, Heads
from ssr_rec.over_archs.base import Flops, OverArch
from tests.jobs import extra_tables_job
from tests.ranks import run_ranks

B, H, T = 6, 5, 3


def randomised(module: torch.nn.Module) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("hidden", [[], [4], [4, 7]])
@pytest.mark.parametrize("shape", [(B, H), (B, T, H)], ids=["shared", "by task"])
def test_every_task_has_its_own_tower_and_head(hidden: list[int], shape: tuple[int, ...]) -> None:
    heads = randomised(Heads(H, T, HeadsConfig(hidden=hidden)))
    features = torch.randn(shape, dtype=torch.float64)
    logits = heads(features)
    for row in range(B):
        for task in range(T):
            y = features[row] if features.dim() == 2 else features[row, task]
            for tower in heads.towers:
                y = (y @ tower.weight[task] + tower.bias[task]).clamp(min=0)
            torch.testing.assert_close(logits[row, task], y @ heads.weight[task] + heads.bias[task])


class Adds(OverArch):
    """Features and logits, the logits from an extra table of one dim and the features from both."""

    out_features = 2

    def __init__(self) -> None:
        super().__init__(2, [4, 8], 1)
        self.extra_tables = {"first_order": (1, 1)}

    def forward(self, x: Tensor, first_order: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, [0, 4]] + first_order, first_order.sum(1, keepdim=True)

    def flops(self) -> Flops:
        return Flops()


def keyed(parts: dict[str, Tensor]) -> KeyedTensor:
    return KeyedTensor(list(parts), [part.shape[1] for part in parts.values()], torch.cat(list(parts.values()), 1))


def fields_of(*names: str) -> list[Feature]:
    return [Feature(name=n, kind="categorical", num_embeddings=9, encoding=Drawn(column=n)) for n in names]


def test_logits_of_the_over_arch_are_added_and_narrow_dims_are_means_of_columns() -> None:
    parts = {  # in the order of some sharding plan
        "b@b@first_order": torch.randn(B, 4),
        "a@a": torch.randn(B, 4),
        "b@b": torch.randn(B, 8),
        "a@a@first_order": torch.randn(B, 4),
    }
    dense = DenseArch(fields_of("a", "b"), Adds())
    first = torch.stack([parts["a@a@first_order"].mean(1), parts["b@b@first_order"].mean(1)], 1)
    x = torch.cat([parts["a@a"], parts["b@b"]], 1)
    inputs = dense.concat(keyed(parts))
    torch.testing.assert_close(inputs, [x, first])
    features = torch.stack([parts["a@a"][:, 0], parts["b@b"][:, 0]], 1) + first
    expected = features @ dense.heads.weight.T + dense.heads.bias + first.sum(1, keepdim=True)
    torch.testing.assert_close(dense(keyed(parts)), expected)


@pytest.mark.parametrize(("dims", "columns"), [((1, 1), 4), ((2, 2), 2), ((3, 3), 4), ((4, 8), 1), ((4, 6), 2)])
def test_columns_per_dim(dims: tuple[int, ...], columns: int) -> None:
    assert columns_per_dim(dims) == columns
    assert all(dim * columns % 4 == 0 for dim in dims)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_a_mean_of_columns_moves_as_one_column_does(make: Any, weight_decay: float) -> None:
    """Why a first-order weight may be stored as four columns."""
    concat = ConcatFields(fields_of("a"), {"first_order": (1,)})
    one, four = torch.ones(1, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizers = [make([weight], lr=0.1, weight_decay=weight_decay) for weight in (one, four)]
    for target in (1.0, -2.0, 0.5, 3.0):
        _, first_order = concat(keyed({"a@a": torch.zeros(1, 4), "a@a@first_order": four.view(1, 4)}))
        for value, optimizer in zip((one, first_order), optimizers, strict=True):
            optimizer.zero_grad()
            (value - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(four, one.expand(4))


def test_tables_of_an_extra_set(dataset) -> None:
    schema = Schema.read(dataset)
    tables = build_tables(schema, EmbeddingsConfig(dim=8), "cpu", {"first_order": (1,) * len(schema.features)})
    found = {table.name: table for table in tables.configs}
    assert list(found) == [*schema.feature_names, *(f"{name}@first_order" for name in schema.feature_names)]
    assert found["user@first_order"].embedding_dim == 4 and found["user"].embedding_dim == 8
    assert found["tags@first_order"].num_embeddings == found["tags"].num_embeddings == 12


@pytest.mark.parametrize("world_size", [1, 2])
def test_extra_tables_reach_the_over_arch(dataset, world_size: int) -> None:
    """Sharded lookups of two tables per feature equal plain indexing, fields in schema order."""
    for error in run_ranks(extra_tables_job, world_size, str(dataset)):
        assert error < 1e-6
