"""One batch of a click log, as this rank sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """This rank's ``B`` rows of a global batch.

    Attributes:
        sparse: every feature, single- and multi-valued, int64 ids, keys in schema order.
        labels: (B, T) float32 of 0 and 1, tasks in schema order.
        group_ids: (B,) int64, the users of GAUC, or None.
        global_rows: rows of the global batch over all ranks. The loss is a sum divided by this, so that it and
            its gradient do not depend on how the rows are spread; B may differ between ranks and may be 0.
    """

    sparse: KeyedJaggedTensor
    labels: Tensor
    group_ids: Tensor | None
    global_rows: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(
            sparse=self.sparse.to(device=device, non_blocking=non_blocking),
            labels=self.labels.to(device=device, non_blocking=non_blocking),
            # Group ids only ever go to the metrics, on the CPU.
            group_ids=self.group_ids,
            global_rows=self.global_rows,
        )

    def pin_memory(self) -> Batch:
        return Batch(self.sparse.pin_memory(), self.labels.pin_memory(), self.group_ids, self.global_rows)

    def record_stream(self, stream: torch.Stream) -> None:
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)
