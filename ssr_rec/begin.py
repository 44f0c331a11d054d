"""What a run begins with: the state of its last checkpoint, another run's weights, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.config import RunConfig
from ssr_rec.data.course import Course
from ssr_rec.metrics import RunningAUC
from ssr_rec.report import RunLog
from ssr_rec.resume import Start, recover_best
from ssr_rec.saver import Saver
from ssr_rec.snapshot import restore
from ssr_rec.trainer import Fitted
from ssr_rec.warm_optimizer import latest_checkpoint, warm_start_optimizer
from ssr_rec.warm_start import warm_start


def begin(
    config: RunConfig,
    start: Start,
    saver: Saver,
    log: RunLog,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    running: RunningAUC,
    train: Course,
) -> tuple[Fitted, dict[str, Any] | None]:
    """What the run has behind it: a checkpoint's state, or nothing but perhaps another run's weights.

    Returns:
        the state, and the report of a warm start or None.
    """
    if start.checkpoint is None:
        if config.warm_start is None:
            return Fitted(), None
        # What old weights make of the first day is seen before they are trained on it.
        fitted, source = Fitted(evaluated_at=-1 if config.data.days else 0), Path(config.warm_start)
        if not config.warm_start_optimizer:
            return fitted, warm_start(model, source, log.progress.note)
        source = latest_checkpoint(source)
        report = warm_start(model, source, log.progress.note)
        report["optimizer"] = warm_start_optimizer(optimizer, source, log.progress.note)
        fitted.steps_before = report["optimizer"]["steps"]
        return fitted, report
    fitted = restore(start.checkpoint, start.info, model, optimizer, running, train, config.seed)
    saver.last_step = fitted.steps
    if fitted.best and recover_best(start, fitted.best["step"], log.progress.note):
        saver.best_step = fitted.best["step"]
    else:
        fitted.best, fitted.bad_evaluations = {}, 0
    return fitted, None
