"""Says which checkpoint of a run folder a run starts from, and whether that is one of this very run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ssr_rec.checkpointing.format import INFO_FILE, PARTIAL, read_info, verify
from ssr_rec.checkpointing.manager import BEST, CHECKPOINTS_FOLDER, TRAINING, list_checkpoints
from ssr_rec.common.errors import UserError
from ssr_rec.config.same_run import check_same_run

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    folder: Path
    checkpoint: Path | None
    """None: from the beginning."""
    info: dict[str, Any]
    """Of the checkpoint, else {}."""


def find_start(config: Mapping[str, Any], folder: Path, goes_on: bool) -> Start:
    """Return the checkpoint to start from: the last good one of this run, or the one that ``resume`` names. Collective.

    Raises:
        UserError: there are checkpoints but none is good, or they are of another run.
    """
    resume = config["resume"]
    if resume not in ("auto", "never"):
        source = Path(resume)
        found = [source] if (source / INFO_FILE).exists() else _training_checkpoints(source)
        if not found:
            raise UserError(f"resume={resume}: no checkpoint and no run folder with one; see {resume}/checkpoints")
    else:
        found = _training_checkpoints(folder) if goes_on else []
    problems = []
    for checkpoint in found:
        try:
            verify(checkpoint)
            info = read_info(checkpoint)
        except ValueError as error:
            problems.append(str(error))
            logger.warning(f"skipped a checkpoint: {error}")
            continue
        if info["kind"] != "training":
            raise UserError(f"{checkpoint}: holds weights alone; start from them with --warm_start={checkpoint}")
        check_same_run(config, info["config"], str(checkpoint))
        if goes_on and dist.get_rank() == 0:
            for damaged in found[: found.index(checkpoint)]:  # out of the way of those to come
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
        dist.barrier()
        return Start(folder, checkpoint, info)
    if problems:
        raise UserError(
            f"no good checkpoint among {len(problems)}: {problems[0]}. Bring the files back, or start anew: another "
            "--name, or --warm_start from best weights"
        )
    return Start(folder, None, {})


def recover_best(start: Start, step: int) -> bool:
    """See that the best weights of ``step`` that a checkpoint names are in the run folder. Collective.

    Returns:
        False when they are lost or damaged; the best has to be found anew.
    """
    assert start.checkpoint is not None
    name = f"{BEST}{step:09d}"
    source, place = start.checkpoint.parent / name, start.folder / CHECKPOINTS_FOLDER / name
    try:
        verify(source)
    except ValueError as error:
        logger.warning(f"the best weights so far are lost, looking for new ones: {error}")
        return False
    if dist.get_rank() == 0 and source.resolve() != place.resolve():
        work = place.with_name(f".{name}{PARTIAL}")
        shutil.copytree(source, work, dirs_exist_ok=True)
        work.rename(place)
    dist.barrier()
    return True


def _training_checkpoints(run_folder: Path) -> list[Path]:
    """Return the same on every rank, however late a shared disk shows them."""
    found = [list_checkpoints(run_folder / CHECKPOINTS_FOLDER, TRAINING)]
    dist.broadcast_object_list(found)
    return found[0]
