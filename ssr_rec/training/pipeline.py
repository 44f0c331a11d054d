"""Builds the TorchRec pipeline of a config."""

from __future__ import annotations

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.config.training import TrainConfig
from ssr_rec.training.accumulation import Accumulation
from ssr_rec.training.bad_steps import SkippingPipeline


def build_pipeline(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer | Accumulation,
    device: torch.device,
    config: TrainConfig,
) -> TrainPipelineSparseDist:
    if config.pipeline == "prefetch":
        return PrefetchTrainPipelineSparseDist(model, optimizer, device)
    if config.skip_bad_steps:
        return SkippingPipeline(model, optimizer, device, config.max_loss)
    return TrainPipelineSparseDist(model, optimizer, device)
