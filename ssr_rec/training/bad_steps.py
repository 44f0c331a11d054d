"""Lets TorchRec's pipeline leave out a batch whose loss is not finite or explodes."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ssr_rec.common.errors import UserError
from ssr_rec.data.day_stream import Course

logger = logging.getLogger(__name__)


class SkippingPipeline(TrainPipelineSparseDist):
    """Runs ``TrainPipelineSparseDist``, but updates nothing, on any rank, for a batch whose loss over all ranks is bad.

    Such a batch comes out with a loss of nan and no rows of logits and labels. Knowing it before the backward pass,
    which updates the tables, costs an all-reduce of one number a step.

    Args:
        max_loss: see ``is_good``.
    """

    def __init__(
        self, model: DistributedModelParallel, optimizer: KeyedOptimizer, device: torch.device, max_loss: float | None
    ) -> None:
        super().__init__(model, optimizer, device, custom_model_fwd=self._forward)
        self._dense = [p for _, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad]
        self._max_loss, self._skips = max_loss, False

    def _forward(self, batch: Any) -> Any:
        loss, output = self._model(batch)
        if not self._model.training:
            return loss, output
        plain, logits, labels, weights, group_ids = output
        total = plain.clone()
        dist.all_reduce(total)
        self._skips = not is_good(total, self._max_loss).item()
        if not self._skips:
            return loss, output
        # DDP waits for a gradient of every dense parameter; the tables' update is the gradient they do not get.
        nothing = torch.stack([parameter.sum() for parameter in self._dense]).sum() * 0.0
        none = None if weights is None else weights[:0]
        return nothing, (plain * torch.nan, logits[:0], labels[:0], none, group_ids)

    def _optimizer_step(self) -> None:
        if not self._skips:
            super()._optimizer_step()


def is_good(losses: torch.Tensor, max_loss: float | None) -> torch.Tensor:
    """Return which losses are good ones: finite, and of at most ``max_loss`` nats per row (None: any)."""
    return losses.isfinite() if max_loss is None else losses.isfinite() & (losses <= max_loss)


def note_bad_steps(
    train: Course,
    first_step: int,
    losses: torch.Tensor,
    good: torch.Tensor,
    skipped: int,
    allowed: int,
) -> None:
    """Steps with a bad loss end the run, unless so many may be skipped: then the pipeline has not trained on them.

    Args:
        losses: of the steps from ``first_step`` (from 0) on, (steps,).
        good: which of them are, (steps,).
        skipped: bad steps so far, these included.
        allowed: ``train.skip_bad_steps``.

    Raises:
        UserError: more bad steps than are allowed; names the first of these.
    """
    bad = (~good).nonzero().flatten().tolist()
    epoch, batch = train.locate(first_step + bad[0])
    what = (
        f"loss is {losses[bad[0]]:g} at step {first_step + bad[0] + 1}, batch {batch} of epoch {epoch} "
        f"({train.describe(epoch, batch)})"
    )
    if skipped > allowed:
        raise UserError(
            f"{what}; checkpoints from before it are kept. Lower optimizer.learning_rate or embeddings.learning_rate, "
            f"set optimizer.clip_norm, or skip such steps with train.skip_bad_steps (now {allowed})"
        )
    logger.info(f"{what}: skipped, {skipped} of {allowed} so far")
