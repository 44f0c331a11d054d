"""The optimizer's state of an older run to begin with, beside its weights: tomorrow's job goes on from today's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.checkpoint import INFO_FILE, read_checkpoint, read_info, stored_tensors
from ssr_rec.run_folder import CHECKPOINTS_FOLDER
from ssr_rec.saver import TRAINING, list_checkpoints
from ssr_rec.snapshot import OPTIMIZER, initialise_optimizer, optimizer_tensors
from ssr_rec.warm_start import first_rows


def latest_checkpoint(source: Path) -> Path:
    """``source`` itself if it is a training checkpoint, else the latest of the run folder ``source``. Collective.

    Raises:
        ValueError: neither, or weights alone.
    """
    if not (source / INFO_FILE).exists():
        found = [list_checkpoints(source / CHECKPOINTS_FOLDER, TRAINING)[:1]]
        dist.broadcast_object_list(found)
        if not found[0]:
            raise ValueError(f"warm_start={source}: no training checkpoint ({TRAINING}*) to take the optimizer from")
        source = found[0][0]
    if read_info(source)["kind"] != "training":
        raise ValueError(
            f"warm_start={source}: weights alone; warm_start_optimizer needs a training checkpoint ({TRAINING}*)"
        )
    return source


def warm_start_optimizer(optimizer: CombinedOptimizer, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Take the optimizer's state from a verified training checkpoint wherever it fits. Collective.

    State fits as weights do (``warm_start``): by name and size, and the new rows of a table that has grown begin
    without any, as they would in a new run. The learning rates are this run's own.

    Returns:
        ``loaded``, ``grown`` and ``fresh``: how many tensors; ``steps``: done so far by all runs before.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    initialise_optimizer(optimizer)
    stored = {name: size for name, (size, _) in stored_tensors(folder).items() if name.startswith(OPTIMIZER)}
    wanted, grown, fresh = {}, 0, []
    for name, value in optimizer_tensors(optimizer).items():
        here, there = value.size(), stored.get(name)
        if here == there:
            wanted[name] = value
        elif there and ".embedding_bags." in name and here[1:] == there[1:] and here[0] > there[0]:
            wanted[name] = first_rows(value, there[0])
            grown += 1
        else:
            fresh.append(name.removeprefix(OPTIMIZER))
    read_checkpoint(wanted, folder)
    info = read_info(folder)
    steps = info["step"] + info["fitted"].get("steps_before", 0)
    optimizer.set_optimizer_step(steps)
    note(f"  optimizer state after {steps} steps: {len(wanted)} tensors, {grown} of them of tables that have grown")
    if fresh:
        note(f"  optimizer state left fresh: {', '.join(fresh)}")
    return {"loaded": len(wanted) - grown, "grown": grown, "fresh": len(fresh), "steps": steps}
