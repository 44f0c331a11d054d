"""Moves the rows of tables on a CPU in the backward pass: by Adam, which FBGEMM has on GPUs alone, or faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torchrec.distributed import batched_embedding_kernel

from ssr_rec.common.errors import UserError
from ssr_rec.kernels.bag_updates import AdamSettings, LookedUp, bag_adam, bag_rowwise_adagrad

MAX_ROWS = 2**32
"""Of a table on a rank: the operators sort rows as 32 bits."""

Specs = list[tuple[int, int, EmbeddingLocation, ComputeDevice]]
"""Rows, columns and place of each table."""


class RowWiseAdagradBags(SplitTableBatchedEmbeddingBagsCodegen):
    """Looks up as FBGEMM does on a CPU, and moves the looked-up rows by ``kernels/bag_updates.py``.

    Args:
        embedding_specs: all on the CPU.
        settings: FBGEMM's.

    Raises:
        UserError: a table has more rows than 2**32.
    """

    def __init__(self, embedding_specs: Specs, **settings: Any) -> None:
        largest = max(rows for rows, *_ in embedding_specs)
        if largest > MAX_ROWS:
            raise UserError(
                f"embeddings.optimizer: a table has {largest} rows on a rank, and on CPU {MAX_ROWS} is the most of "
                "rowwise_adagrad and lazy_adam; use adagrad"
            )
        super().__init__(embedding_specs, **settings)

    def forward(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **more: Any
    ) -> Tensor:
        assert not more, "bags of one batch size"
        if not torch.is_grad_enabled():
            return super().forward(indices, offsets, per_sample_weights)
        assert per_sample_weights is None or not per_sample_weights.requires_grad, "weights of ids are data"
        # Steps of training alone, also those whose loss turns out bad; FBGEMM counts evaluations, too.
        self.iter += 1
        return _Lookup.apply(self.placeholder_autograd_tensor, self, indices, offsets, per_sample_weights)

    def look_up(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        return super().forward(indices, offsets, per_sample_weights)

    def move(self, grad: Tensor, bags: LookedUp, t: int) -> None:
        """Move the rows of a batch at step t, from 1 on, by the gradient of its bags."""
        lr, eps = self.get_learning_rate(), self.optimizer_args.eps
        bag_rowwise_adagrad(self.weights_host, self.momentum1_host, grad, bags, self.momentum1_offsets, lr, eps)


class AdamBags(RowWiseAdagradBags):
    """Does so by Adam. To TorchRec it is FBGEMM's module: state, learning rate and step have the same names."""

    def __init__(self, embedding_specs: Specs, **settings: Any) -> None:
        super().__init__(embedding_specs, **settings | {"optimizer": EmbOptimType.EXACT_SGD})
        self.moments = [torch.zeros_like(self.weights_host.detach()) for _ in range(2)]

    def move(self, grad: Tensor, bags: LookedUp, t: int) -> None:
        given = self.optimizer_args
        settings = AdamSettings(self.get_learning_rate(), given.beta1, given.beta2, given.eps, given.weight_decay)
        first, second = self.moments
        bag_adam(self.weights_host, first, second, grad, bags, settings, t)

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        starts = self.weights_physical_offsets
        return [
            {
                name: moment[start : start + rows * columns].view(rows, columns)
                for name, moment in zip(("exp_avg", "exp_avg_sq"), self.moments, strict=True)
            }
            for start, (rows, columns, *_) in zip(starts, self.embedding_specs, strict=True)
        ]


class _Lookup(Function):
    @staticmethod
    def forward(
        ctx: Any, placeholder: Tensor, module: RowWiseAdagradBags, ids: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        ctx.module, ctx.t = module, int(module.iter)
        ctx.save_for_backward(ids, offsets, weights)
        return module.look_up(ids, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None, None]:
        module, (ids, offsets, weights) = ctx.module, ctx.saved_tensors
        mean = module.pooling_mode == PoolingMode.MEAN
        module.move(grad, LookedUp(module.weights_offsets, module.D_offsets, ids, offsets, weights, mean), ctx.t)
        return None, None, None, None, None


KINDS = {EmbOptimType.ADAM: AdamBags, EmbOptimType.EXACT_ROWWISE_ADAGRAD: RowWiseAdagradBags}


@contextmanager
def own_updates() -> Iterator[None]:
    """Make TorchRec build fp32 tables on a CPU as the classes above where they have the optimizer."""
    usual = SplitTableBatchedEmbeddingBagsCodegen

    def build(embedding_specs: Specs, **settings: Any) -> SplitTableBatchedEmbeddingBagsCodegen:
        plain = (
            all(device == ComputeDevice.CPU and rows for rows, *_, device in embedding_specs)
            and settings.get("weights_precision", SparseType.FP32) == SparseType.FP32
            and settings.get("pooling_mode") != PoolingMode.NONE
            and not settings.get("gradient_clipping")
        )
        if plain:
            return KINDS.get(settings.get("optimizer"), usual)(embedding_specs, **settings)
        return usual(embedding_specs, **settings)

    setattr(batched_embedding_kernel, usual.__name__, build)
    try:
        yield
    finally:
        setattr(batched_embedding_kernel, usual.__name__, usual)
