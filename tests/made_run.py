"""A run folder with random weights, made without training, for the tests of what follows training."""

import warnings
from pathlib import Path

import torch

from ssr_rec.checkpointing.format import write_checkpoint
from ssr_rec.config.run import dump_config, load_config
from ssr_rec.data.schema import Schema
from ssr_rec.model.ctr_model import CTRModel
from ssr_rec.serving.trained_model import TASK, build_plain_model


def randomised(model: CTRModel, seed: int, noise: float = 0.3) -> CTRModel:
    """Every weight and running statistic drawn, so that no default of 0 or 1 hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                drawn = noise * torch.randn(value.shape, generator=generator)
                value.copy_(1 + drawn.abs() if name.endswith("running_var") else value + drawn)
    return model


def make_run(folder: Path, dataset: Path, overrides: list[str], noise: float = 0.3) -> Path:
    """``folder`` as a run of ``overrides`` on ``dataset`` would leave it, without a report."""
    folder.mkdir(parents=True)
    config = load_config(None, [f"--data.path={dataset}", *overrides])
    (folder / "config.yaml").write_text(dump_config(config))
    schema = Schema.read(dataset).select(config.data.features, config.data.labels)
    model = randomised(build_plain_model(config, schema), 0, noise)
    tensors = {TASK + name: value for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        write_checkpoint(tensors, {"kind": "weights", "step": 1}, folder / "checkpoints" / "best-000000001")
    return folder
