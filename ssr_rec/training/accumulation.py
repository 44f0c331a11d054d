"""Accumulates gradients: the tables are updated by every batch, the dense part once for a group of batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer


class Accumulation:
    """Serves a TorchRec pipeline as its optimizer when the dense part is updated once for several batches.

    The dense gradient of a group is that of one batch of all its rows: the mean over the group's rows, whatever the
    sizes of its batches. Ranks reduce it once, with the group's last batch. The fused optimizer moves the tables'
    rows in the backward pass of every batch, each batch's gradient being the mean over that batch's rows.

    A batch that the pipeline skips (``bad_steps.py``) belongs to its group with no rows.
    """

    def __init__(self, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
        self._fused = [part for name, part in optimizer.optimizers if name == "fused"]
        self._dense = [part for name, part in optimizer.optimizers if name != "fused"]
        self._parameters = [parameter for part in self._dense for parameter in part.params.values()]
        self._model = model
        self._rows_before = self._rows_now = self._rows_in_group = 0
        self._steps = False

    @contextmanager
    def batch(self, rows: int, ends_group: bool) -> Iterator[None]:
        """Surround the pipeline's progress by one batch.

        Args:
            rows: of the global batch.
            ends_group: whether the dense part is updated after this batch.
        """
        self._rows_now, self._steps = rows, False
        wrapped = self._model._dmp_wrapped_module
        # Replicated tables (``adam``) have a DDP of their own, which reduces with every batch: averaging what is
        # averaged already changes nothing.
        waits = isinstance(wrapped, DistributedDataParallel) and not ends_group
        with wrapped.no_sync() if waits else nullcontext():
            yield
        self._rows_before = rows
        self._rows_in_group += rows if self._steps else 0
        if not ends_group:
            return
        if self._rows_in_group:
            self._scale(rows / self._rows_in_group)
            for part in self._dense:
                part.step()
        self._rows_before = self._rows_in_group = 0

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the gradients that no later batch of the group adds to; the pipeline calls it before each batch."""
        for part in self._fused:
            part.zero_grad(set_to_none)
        if not self._rows_before:
            for part in self._dense:
                part.zero_grad(set_to_none)
        elif self._rows_before != self._rows_now:
            # Gradients are added up as if every batch of the group had the rows of the latest.
            self._scale(self._rows_before / self._rows_now)

    def step(self) -> None:
        """Update the tables; the pipeline calls it after each batch that it does not skip."""
        self._steps = True
        for part in self._fused:
            part.step()

    def _scale(self, factor: float) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
