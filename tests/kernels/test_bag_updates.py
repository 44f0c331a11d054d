"""Updates of the rows that bags look up: Adam against a loop in float64, row-wise Adagrad against FBGEMM's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed import batched_embedding_kernel

from ssr_rec.common.errors import UserError
from ssr_rec.embeddings.cpu_bags import AdamBags, RowWiseAdagradBags, own_updates
from ssr_rec.kernels import bag_updates as module
from ssr_rec.kernels import extension
from ssr_rec.kernels.bag_updates import AdamSettings, LookedUp, bag_adam, bag_rowwise_adagrad

SETTINGS = AdamSettings(0.05, 0.8, 0.95, 1e-4, 0.1)
TABLES = [(5, 4), (40, 12), (70_000, 8)]
"""Rows and columns; the second is of two features."""
FEATURES = [0, 1, 1, 2]


class Loop:
    """The equations of the docstring, number by number."""

    def __init__(self, tables: list[np.ndarray]) -> None:
        self.w = [table.astype(np.float64) for table in tables]
        self.m, self.v = ([np.zeros_like(w) for w in self.w] for _ in range(2))

    def step(self, bags: list[list[list[int]]], grads: list[np.ndarray], weights: list, mean: bool, t: int) -> None:
        """One step; ``bags`` are feature -> row of the batch -> ids."""
        found: dict[tuple[int, int], np.ndarray] = {}
        for feature, of_batch in enumerate(bags):
            for b, ids in enumerate(of_batch):
                for place, row in enumerate(ids):
                    share = (weights[feature][b][place] if weights else 1.0) / (len(ids) if mean else 1)
                    key = FEATURES[feature], row
                    found[key] = found.get(key, 0.0) + share * grads[feature][b].astype(np.float64)
        lr, beta1, beta2, eps, decay = SETTINGS
        for (table, row), gradient in found.items():
            for column, g in enumerate(gradient):
                at = row, column
                m = self.m[table][at] = beta1 * self.m[table][at] + (1 - beta1) * g
                v = self.v[table][at] = beta2 * self.v[table][at] + (1 - beta2) * g * g
                moved = m / (1 - beta1**t) / (math.sqrt(v / (1 - beta2**t)) + eps)
                self.w[table][at] -= lr * (moved + decay * self.w[table][at])


def drawn(generator: np.random.Generator, batch: int) -> list[list[list[int]]]:
    """Ids of each feature's bags, some empty, with repeats in a bag and between bags; the last row is never drawn."""
    rows = [TABLES[table][0] - 1 for table in FEATURES]
    return [[generator.integers(0, limit, generator.integers(0, 5)).tolist() for _ in range(batch)] for limit in rows]


def looked_up(bags: list[list[list[int]]], weights: list, mean: bool, kind: torch.dtype) -> LookedUp:
    sizes = [rows * columns for rows, columns in TABLES]
    starts = [sum(sizes[:table]) for table in FEATURES]
    columns = np.cumsum([0, *(TABLES[table][1] for table in FEATURES)])
    each = [ids for of_batch in bags for ids in of_batch]
    given = [value for of_batch in weights for of_bag in of_batch for value in of_bag]
    return LookedUp(
        torch.tensor(starts),
        torch.tensor(columns, dtype=torch.int32),
        torch.tensor([row for ids in each for row in ids], dtype=kind),
        torch.tensor(np.cumsum([0, *map(len, each)]), dtype=kind),
        torch.tensor(given, dtype=torch.float32) if weights else None,
        mean,
    )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("mean", "weighted", "kind"), [(False, False, torch.int64), (True, True, torch.int32), (False, True, torch.int64)]
)
def test_every_row_moves_as_a_loop_moves_it(
    mean: bool, weighted: bool, kind: torch.dtype, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extension.load()
    if plain:
        monkeypatch.setattr(module, "has_operators", lambda device: False)
    generator, batch = np.random.default_rng(0), 150
    tables = [generator.uniform(-1, 1, shape).astype(np.float32) for shape in TABLES]
    loop, flat = Loop(tables), torch.from_numpy(np.concatenate([table.ravel() for table in tables]))
    before, moments = flat.clone(), (torch.zeros_like(flat), torch.zeros_like(flat))
    seen = set()
    for t in range(1, 4):
        bags = drawn(generator, batch)
        seen |= {(FEATURES[f], row) for f, of_batch in enumerate(bags) for ids in of_batch for row in ids}
        weights = [[generator.uniform(0, 2, len(ids)).astype(np.float32) for ids in of] for of in bags]
        grads = [generator.normal(size=(batch, TABLES[table][1])).astype(np.float32) for table in FEATURES]
        loop.step(bags, grads, weights if weighted else [], mean, t)
        arguments = looked_up(bags, weights if weighted else [], mean, kind)
        bag_adam(flat, *moments, torch.from_numpy(np.concatenate(grads, axis=1)), arguments, SETTINGS, t)
    for got, wanted, apart in zip((flat, *moments), (loop.w, loop.m, loop.v), (1e-6, 2e-5, 2e-5), strict=True):
        np.testing.assert_allclose(got, np.concatenate([one.ravel() for one in wanted]), atol=apart)
    start = 0
    for table, (rows, columns) in enumerate(TABLES):
        for row in set(range(min(rows, 500))) - {row for of, row in seen if of == table}:
            at = slice(start + row * columns, start + (row + 1) * columns)
            assert torch.equal(flat[at], before[at])
        start += rows * columns


def test_one_row_of_two_tables_is_two_rows() -> None:
    """The last id of one table and the first of the next are the same number."""
    assert extension.load()
    flat, sums = torch.zeros(8), torch.zeros(2)
    bags = LookedUp(
        *(torch.tensor([0, 4]), torch.tensor([0, 4, 8], dtype=torch.int32)),
        *(torch.tensor([0, 0]), torch.tensor([0, 1, 2]), None, False),
    )
    grad = torch.tensor([[1.0] * 4 + [2.0] * 4])
    bag_rowwise_adagrad(flat, sums, grad, bags, torch.tensor([0, 1]), 1.0, 0.0)
    assert sums.tolist() == [1.0, 4.0] and flat.tolist() == [-1.0] * 8


def test_the_number_of_threads_decides_no_bit() -> None:
    assert extension.load()
    generator = np.random.default_rng(1)
    bags = [[ids * 3 for ids in of_batch] for of_batch in drawn(generator, 700)]
    grad = torch.from_numpy(generator.normal(size=(700, 36)).astype(np.float32))
    size, threads, found = sum(rows * columns for rows, columns in TABLES), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            state = [torch.full((size,), value) for value in (0.5, 0.0, 0.0)]
            bag_adam(*state, grad, looked_up(bags, [], True, torch.int64), SETTINGS, 1)
            found.append(state)
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


SPECS = [(rows, columns, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, columns in TABLES]


@pytest.mark.parametrize(
    ("pooling", "plain"), [(PoolingMode.MEAN, False), (PoolingMode.SUM, False), (PoolingMode.SUM, True)]
)
def test_rowwise_adagrad_is_that_of_fbgemm(pooling: PoolingMode, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.load()
    if plain:
        monkeypatch.setattr(module, "has_operators", lambda device: False)
    settings = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05, "eps": 1e-4}
    given = {"feature_table_map": FEATURES, "pooling_mode": pooling, **settings}
    usual, ours = (kind(SPECS, **given) for kind in (SplitTableBatchedEmbeddingBagsCodegen, RowWiseAdagradBags))
    generator = np.random.default_rng(3)
    for mine, theirs in zip(ours.split_embedding_weights(), usual.split_embedding_weights(), strict=True):
        mine.copy_(theirs.uniform_(-1, 1))
    for _ in range(3):
        bags = drawn(generator, 100)
        weights = [[generator.uniform(0, 2, len(ids)).astype(np.float32) for ids in of] for of in bags]
        inputs = looked_up(bags, weights if pooling == PoolingMode.SUM else [], True, torch.int64)
        pooled = [one(inputs.ids, inputs.offsets, inputs.id_weights) for one in (ours, usual)]
        torch.testing.assert_close(*pooled, atol=1e-5, rtol=1e-5)
        grad = torch.from_numpy(generator.normal(size=(100, 36)).astype(np.float32))
        for one in pooled:
            one.backward(grad)
    for table, (mine, theirs) in enumerate(
        zip(ours.split_embedding_weights(), usual.split_embedding_weights(), strict=True)
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        state = [one.get_optimizer_state()[table]["sum"] for one in (ours, usual)]
        torch.testing.assert_close(*state, atol=1e-4, rtol=1e-5)
        assert 0 < int((state[0] > 0).sum()) < TABLES[table][0]


def test_it_looks_up_and_moves_in_the_backward_pass_and_counts_training_steps_alone() -> None:
    assert extension.load()
    settings = dict(zip(("learning_rate", *AdamSettings._fields[1:]), SETTINGS, strict=True))
    tables = AdamBags(SPECS, feature_table_map=FEATURES, pooling_mode=PoolingMode.MEAN, **settings)
    generator = np.random.default_rng(2)
    starting = [generator.uniform(-1, 1, shape).astype(np.float32) for shape in TABLES]
    for held, wanted in zip(tables.split_embedding_weights(), starting, strict=True):
        held.copy_(torch.from_numpy(wanted))
    loop = Loop(starting)
    for t in (1, 2):
        bags = drawn(generator, 6)
        inputs = looked_up(bags, [], True, torch.int64)
        with torch.no_grad():
            still = tables(inputs.ids, inputs.offsets)  # an evaluation, which is no step
        pooled = tables(inputs.ids, inputs.offsets)
        assert torch.equal(pooled, still)
        grads = [generator.normal(size=(6, TABLES[table][1])).astype(np.float32) for table in FEATURES]
        for feature, of_batch in enumerate(bags):
            for b, ids in enumerate(of_batch):
                wanted = loop.w[FEATURES[feature]][ids].mean(0) if ids else 0.0
                at = slice(inputs.columns[feature], inputs.columns[feature + 1])
                np.testing.assert_allclose(pooled[b, at].detach(), wanted, atol=1e-5)
        pooled.backward(torch.from_numpy(np.concatenate(grads, axis=1)))
        loop.step(bags, grads, [], True, t)
    state: list[dict[str, Tensor]] = tables.get_optimizer_state()
    for place, held in enumerate(tables.split_embedding_weights()):
        for got, wanted in ((held, loop.w), (state[place]["exp_avg"], loop.m), (state[place]["exp_avg_sq"], loop.v)):
            np.testing.assert_allclose(got, wanted[place], atol=1e-5)


def test_torchrec_builds_them_for_fp32_on_a_cpu_alone() -> None:
    name = "SplitTableBatchedEmbeddingBagsCodegen"
    usual = getattr(batched_embedding_kernel, name)
    specs, kinds = [(5, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], EmbOptimType
    with own_updates():
        build = getattr(batched_embedding_kernel, name)
        assert type(build(specs, optimizer=kinds.ADAM)) is AdamBags
        assert type(build(specs, optimizer=kinds.EXACT_ROWWISE_ADAGRAD)) is RowWiseAdagradBags
        halves = build(specs, optimizer=kinds.EXACT_ROWWISE_ADAGRAD, weights_precision=SparseType.FP16)
        assert type(halves) is type(build(specs, optimizer=kinds.EXACT_SGD)) is usual
        for own in ({"pooling_mode": PoolingMode.NONE}, {"gradient_clipping": True}):
            assert type(build(specs, optimizer=kinds.EXACT_ROWWISE_ADAGRAD, **own)) is usual
    assert getattr(batched_embedding_kernel, name) is usual


@pytest.mark.parametrize("kind", [AdamBags, RowWiseAdagradBags])
def test_too_many_rows_are_refused_before_they_take_memory(kind: type) -> None:
    with pytest.raises(UserError, match=r"a table has 4294967297 rows on a rank, and on CPU 4294967296 is the most"):
        kind([(2**32 + 1, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)])


def test_a_gradient_of_other_bags_is_refused() -> None:
    assert extension.load()
    bags = LookedUp(
        *(torch.tensor([0]), torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0]), torch.tensor([0, 1])),
        *(None, False),
    )
    for shape in ((2, 4), (1, 8), (4,)):
        with pytest.raises(RuntimeError, match="the gradient must be of every bag's columns"):
            bag_rowwise_adagrad(torch.zeros(8), torch.zeros(2), torch.zeros(shape), bags, torch.tensor([0]), 1.0, 0.0)
