"""Runs Adam in the backward pass of tables on a CPU, which FBGEMM does on GPUs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torchrec.distributed import batched_embedding_kernel

from ssr_rec.common.errors import UserError
from ssr_rec.kernels.bag_adam import AdamSettings, LookedUp, bag_adam

MAX_ROWS = 2**32
"""Of a table on a rank: the operator sorts rows as 32 bits."""


class AdamBags(SplitTableBatchedEmbeddingBagsCodegen):
    """Looks up as FBGEMM does, and moves the looked-up rows itself (``kernels/bag_adam.py``).

    To TorchRec it is FBGEMM's module with ``EmbOptimType.ADAM``: state, learning rate and step have the same names.

    Args:
        embedding_specs: rows, columns and place of each table, all on the CPU.
        settings: FBGEMM's, with ``beta1``, ``beta2``, ``eps`` and ``weight_decay``.

    Raises:
        UserError: a table has more rows than 2**32.
    """

    def __init__(
        self, embedding_specs: list[tuple[int, int, EmbeddingLocation, ComputeDevice]], *args: Any, **settings: Any
    ) -> None:
        largest = max(rows for rows, *_ in embedding_specs)
        if largest > MAX_ROWS:
            raise UserError(
                f"embeddings.optimizer=lazy_adam: on CPU a table can have {MAX_ROWS} rows a rank, and one has {largest}; "
                "use rowwise_adagrad"
            )
        super().__init__(embedding_specs, *args, **settings | {"optimizer": EmbOptimType.EXACT_SGD})
        self.moments = [torch.zeros_like(self.weights_host.detach()) for _ in range(2)]

    def forward(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, *args: Any, **more: Any
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(indices, offsets, per_sample_weights, *args, **more)
        assert not args and not more, "bags of one batch size"
        # By steps, as FBGEMM counts them: also those whose loss turns out bad.
        self.iter += 1
        return _Lookup.apply(self.placeholder_autograd_tensor, self, indices, offsets, per_sample_weights)

    def look_up(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        return super().forward(indices, offsets, per_sample_weights)

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
        ctx: Any, placeholder: Tensor, module: AdamBags, ids: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        ctx.module, ctx.t = module, int(module.iter)
        ctx.save_for_backward(ids, offsets, weights)
        return module.look_up(ids, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None, None]:
        module, (ids, offsets, weights) = ctx.module, ctx.saved_tensors
        mean = module.pooling_mode == PoolingMode.MEAN
        bags = LookedUp(module.weights_offsets, module.D_offsets, ids, offsets, weights, mean)
        arguments = module.optimizer_args
        settings = AdamSettings(
            module.get_learning_rate(), arguments.beta1, arguments.beta2, arguments.eps, arguments.weight_decay
        )
        first, second = module.moments
        bag_adam(module.weights_host, first, second, grad, bags, settings, ctx.t)
        return None, None, None, None, None


@contextmanager
def adam_on_cpu() -> Iterator[None]:
    """Make TorchRec build tables on a CPU whose optimizer is Adam as ``AdamBags``."""
    name = SplitTableBatchedEmbeddingBagsCodegen.__name__

    def build(embedding_specs: list[Any], **settings: Any) -> SplitTableBatchedEmbeddingBagsCodegen:
        on_cpu = all(device == ComputeDevice.CPU for *_, device in embedding_specs)
        adam = settings.get("optimizer") == EmbOptimType.ADAM
        kind = AdamBags if adam and on_cpu else SplitTableBatchedEmbeddingBagsCodegen
        return kind(embedding_specs, **settings)

    setattr(batched_embedding_kernel, name, build)
    try:
        yield
    finally:
        setattr(batched_embedding_kernel, name, SplitTableBatchedEmbeddingBagsCodegen)
