"""Heads of each domain against plain loops; which columns may be a domain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssr_rec.config.heads import HeadsConfig
from ssr_rec.config.run import resolve
from ssr_rec.data.features import Hashing, LogBuckets
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.data.value_columns import value_column
from ssr_rec.model.build import build_dense
from ssr_rec.model.ctr_model import Heads
from ssr_rec.over_archs.base import Domain
from ssr_rec.planning.costs import dense_cost
from ssr_rec.serving.trained_model import build_plain_model
from tests.made_run import randomised as randomised_model
from tests.model.test_model import B, H, T, randomised
from tests.over_archs.test_contract import CASES

N = 4
DOMAIN = Domain("tab", N)


@pytest.mark.parametrize("hidden", [[], [4], [4, 7]])
@pytest.mark.parametrize("shape", [(B, H), (B, T, H)], ids=["shared", "by task"])
def test_a_row_has_the_shared_heads_and_the_delta_of_its_domain(hidden: list[int], shape: tuple[int, ...]) -> None:
    heads: Heads = randomised(Heads(H, T, HeadsConfig(hidden=hidden, per_domain=True), DOMAIN))
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    domain = torch.tensor([0, 2, 1, 0, 2, 0])
    deltas = heads.deltas
    assert deltas is not None
    wanted = torch.empty(B, T, dtype=torch.float64)
    for row, d in enumerate(domain.tolist()):
        for task in range(T):
            y = features[row] if features.dim() == 2 else features[row, task]
            for tower, delta in zip(heads.towers, deltas.towers, strict=True):
                weight = tower.weight[task] + delta.weight[d, task]  # type: ignore[index]
                y = (y @ weight + tower.bias[task] + delta.bias[d, task]).clamp(min=0)  # type: ignore[index]
            weight = heads.weight[task] + deltas.weight[d, task]
            wanted[row, task] = y @ weight + heads.bias[task] + deltas.bias[d, task]
    logits = heads(features, domain)
    torch.testing.assert_close(logits, wanted)
    weights, cotangent = [features, *heads.parameters()], torch.randn_like(wanted)
    both = [torch.autograd.grad(y, weights, cotangent) for y in (logits, wanted)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("hidden", [[], [4]])
def test_a_domain_that_was_never_trained_has_the_shared_heads(hidden: list[int]) -> None:
    torch.manual_seed(0)
    heads = Heads(H, T, HeadsConfig(hidden=hidden, per_domain=True), DOMAIN)
    shared = Heads(H, T, HeadsConfig(hidden=hidden))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1, weight_decay=0.1)
    x, seen = torch.randn(B, H), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(3):
        heads(x, seen).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    shared.load_state_dict(heads.state_dict(), strict=False)
    assert torch.equal(heads(x, torch.full((B,), 3)), shared(x))
    assert (heads(x, seen) - shared(x)).abs().min() > 1e-3


@pytest.mark.parametrize("case", [name for name in CASES if "switched" not in name])
def test_every_over_arch_has_heads_of_each_domain(dataset: Path, case: str) -> None:
    """With no deltas the logits are those without; with deltas of one domain, the rows of the others keep theirs."""
    schema = Schema.read(dataset)
    values = {"over_arch": CASES[case], "embeddings": {"dim": 8}}
    shared = randomised_model(build_plain_model(resolve(values, "test"), schema), 3)
    config = resolve({**values, "domain": "item", "heads": {"per_domain": True}}, "test")
    model = build_plain_model(config, schema)
    model.load_state_dict(shared.state_dict(), strict=False)
    batch = next(iter(Reader(dataset, schema, "test", batch_size=100).epoch(0)))
    with torch.no_grad():
        wanted = shared(batch.sparse)
        assert torch.equal(model(batch.sparse), wanted)
        deltas = model.dense.heads.deltas
        assert deltas is not None
        deltas.weight[7] += 0.1
        deltas.bias[7] += 1.0
        moved = (model(batch.sparse) != wanted).all(1)
    assert torch.equal(moved, batch.sparse["item"].values() == 7) and moved.any()


def refused(schema: Schema, **settings: object) -> str:
    with pytest.raises(ValueError) as error:
        build_dense(resolve({"embeddings": {"dim": 8}, **settings}, "test"), schema)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_that_are_no_domain_are_refused(dataset: Path) -> None:
    schema = Schema.read(dataset)

    def with_encoding(encoding: object) -> Schema:
        changed = [f.model_copy(update={"encoding": encoding} if f.name == "item" else {}) for f in schema.features]
        return schema.model_copy(update={"features": changed})

    assert "'tab' is no feature of this run on 'tiny'; those that can be: user, item, price" in refused(
        schema, domain="tab"
    )
    assert "'tags' of 'tiny' is a list" in refused(schema, domain="tags")
    assert "hashed" in refused(with_encoding(Hashing(column="item", num_buckets=29)), domain="item")
    buckets = LogBuckets(column="item", low=0, high=1, num_buckets=29)
    assert "numbers in buckets" in refused(with_encoding(buckets), domain="item")
    many = [f.model_copy(update={"num_embeddings": 65} if f.name == "user" else {}) for f in schema.features]
    assert "has 65 ids, more than 64" in refused(schema.model_copy(update={"features": many}), domain="user")
    left_out = schema.select(["user", "price"], None)
    assert "'item' is no feature of this run" in refused(left_out, domain="item")
    managed = {"dim": 8, "managed": {"item": {"rows": 8}}}
    assert "embeddings.managed" in refused(schema, domain="item", embeddings=managed)
    for key, settings in (
        ("heads.per_domain=true", {"heads": {"per_domain": True}}),
        ("over_arch.domain_views=2", {"over_arch": {"name": "ssr", "domain_views": 2}}),
    ):
        with pytest.raises(ValueError, match=f"{key} needs domain"):
            resolve(settings, "test")
    with pytest.raises(ValueError, match=r"train.metrics_by: 'tags' of 'tiny' is a list"):
        value_column(schema, "tags", dataset)


def test_a_plan_counts_the_parts_of_domains(dataset: Path) -> None:
    schema = Schema.read(dataset)
    over_arch = {"name": "ssr", "num_views": 2, "view_dim": 8, "domain_views": 1}
    values = {"embeddings": {"dim": 8}, "domain": "item", "over_arch": over_arch}
    config = resolve({**values, "heads": {"per_domain": True, "hidden": [4]}}, "test")
    dense = build_dense(config, schema)

    class Case:
        def __init__(self) -> None:
            self.config, self.schema = config, schema
            from ssr_rec.embeddings.histories import reading_of

            self.reading = reading_of(schema, config.sequences)

    cost = dense_cost(Case())  # type: ignore[arg-type]
    assert cost.parameters == sum(p.numel() for p in dense.parameters())
    towers = 2 * 2 * (dense.over_arch.out_features * 4 + 4)  # two tasks
    assert cost.matmul_flops == dense.over_arch.flops().matmul + 2 * towers
    assert cost.activation_bytes > 0
