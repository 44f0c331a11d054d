"""The optimizer's state of an older run to begin with, beside its weights: tomorrow's job goes on from today's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
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
    wanted: dict[str, Tensor | ShardedTensor] = {}
    kinds: dict[str, str] = {}
    for name, value in optimizer_tensors(optimizer).items():
        here, there = value.size(), stored.get(name)
        if here == there:
            wanted[name], kinds[name] = value, "loaded"
        elif there and ".embedding_bags." in name and here[1:] == there[1:] and here[0] > there[0]:
            wanted[name], kinds[name] = first_rows(value, there[0]), "grown"
        else:
            kinds[name] = "fresh"
    read_checkpoint(wanted, folder)
    info = read_info(folder)
    steps = info["step"] + info["fitted"].get("steps_before", 0)
    optimizer.set_optimizer_step(steps)
    # A rank knows the state of the tables it holds.
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, kinds)
    everywhere = dict(chain.from_iterable(found.items() for found in of_ranks))
    found = {kind: [n for n, k in everywhere.items() if k == kind] for kind in ("loaded", "grown", "fresh")}
    report = {kind: len(names) for kind, names in found.items()}
    note(
        f"  optimizer state after {steps} steps: " + ", ".join(f"{n} tensors {kind}" for kind, n in report.items() if n)
    )
    if found["fresh"]:
        note(f"  left fresh: {', '.join(name.removeprefix(OPTIMIZER) for name in found['fresh'])}")
    return {**report, "steps": steps}
