"""Read weights out of a checkpoint: the best of a run for its test, or those of an older run to begin with."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.checkpointing.format import INFO_FILE, read_checkpoint, read_info, stored_tensors, verify
from ssr_rec.checkpointing.manager import BEST, CHECKPOINTS_FOLDER, TRAINING, list_checkpoints
from ssr_rec.checkpointing.train_state import (
    MODEL,
    OPTIMIZER,
    initialise_optimizer,
    model_tensors,
    optimizer_tensors,
)
from ssr_rec.checkpointing.warm_rows import (
    COLLECTION,
    OF_TASKS,
    TASKS,
    Here,
    RowMap,
    feature_of,
    names_there,
    row_maps,
    taken,
)
from ssr_rec.checkpointing.warm_tensors import first_rows, round_into, with_dtype
from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import OverArch

logger = logging.getLogger(__name__)

ROWS_OF_IDS = "._mch_sorted_raw_ids"
"""Name's end of the ids that have a row of a managed table (``ssr_rec/embeddings/evicting_tables.py``)."""


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read all weights of ``model`` from a checkpoint, whatever world size wrote it. Collective.

    Raises:
        UserError: not a good checkpoint, or one of another model.
    """
    verify(folder)
    tensors = model_tensors(model)
    read_checkpoint(tensors, folder)
    model.load_state_dict({name.removeprefix(MODEL): value for name, value in tensors.items()})


def warm_start(
    model: nn.Module,
    source: Path,
    here: Here,
    optimizer: CombinedOptimizer | None = None,
) -> dict[str, Any]:
    """Begin with the weights of another run, and with its optimizer's state, wherever they fit. Collective.

    A tensor fits when name and size are the same; a table that has more rows now keeps its old ones and has fresh
    ones after them, which is what an extended vocabulary means. On another dataset, rows follow their values
    (``row_maps``), and heads their labels' names. Weights of another precision are rounded to nearest.

    Args:
        source: a checkpoint, or a run folder, of which the best weights are taken; with an optimizer a training
            checkpoint, or the latest of the run folder.
        optimizer: whose state to take, too; its learning rates are this run's own.

    Returns:
        ``source`` and the names that were ``loaded``, ``grown`` (with the rows kept), ``mapped`` (with the rows whose
        value was found), ``fresh`` (not in the checkpoint), ``other_size`` and ``unused`` (only in the checkpoint); of
        those taken, ``other_dtype`` with the checkpoint's. ``optimizer``: how many of its tensors are what, and
        ``steps``, done so far by all runs before.

    Raises:
        UserError: no good checkpoint there, nothing fits, a weight is too large for this model's precision, or
            which row means which value, or which part which label, cannot be told.
    """
    folder = latest_checkpoint(source, needs_optimizer=optimizer is not None)
    verify(folder)
    maps = row_maps(folder, here)
    of_tables = {feature.name: feature.table for feature in here.schema.features}
    maps |= {f"per_domain.{name}": maps[table] for name, table in of_tables.items() if table in maps}
    tensors = model_tensors(model)
    weights = _match(tensors, folder, maps, MODEL)
    _refuse_parts_of_tasks(source, model, weights, maps, here)
    _refuse_managed_ids(source, weights)
    fitting = [name for kind in ("loaded", "grown", "mapped") for name in weights.of(kind)]
    if all(OF_TASKS.search(name) for name in fitting):
        raise UserError(f"warm_start={source}: nothing in {folder} fits this model; it has {', '.join(weights.unused)}")
    too_large = _take(weights, folder)
    problems: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(problems, too_large)
    for name in chain.from_iterable(problems):
        raise UserError(
            f"warm_start={source}: {name.removeprefix(MODEL)} has values beyond the range of {tensors[name].dtype}; "
            "keep it in fp32 by embeddings.dtypes"
        )
    model.load_state_dict({name.removeprefix(MODEL): value for name, value in tensors.items()})
    for module in model.modules():
        if isinstance(module, OverArch):
            module.forget_looks()
    report = {"source": str(folder), **weights.report()}
    _log_report(folder, report)
    if optimizer is not None:
        report["optimizer"] = _warm_start_optimizer(optimizer, folder, maps, {*report["fresh"], *report["other_size"]})
    return report


def _log_report(folder: Path, report: Mapping[str, Any]) -> None:
    counts = [f"{len(report[key])} {text}" for key, text in WORDS.items() if report[key]]
    logger.info(f"warm start from {folder}: " + ", ".join(counts))
    for key in WORDS:
        if key != "loaded" and report[key]:
            found = report[key].items() if key == "mapped" else ((name, None) for name in report[key])
            logger.info(
                f"  {WORDS[key]}: " + ", ".join(name if rows is None else f"{name} {rows}" for name, rows in found)
            )


WORDS = {
    "loaded": "tensors as they were",
    "grown": "tables that have grown and keep their old rows",
    "mapped": "tables whose rows follow their values, and heads their labels (how many found their old row)",
    "fresh": "tensors not in the checkpoint, left fresh",
    "other_size": "tensors of another size, left fresh",
    "other_dtype": "of these in another precision, rounded",
    "unused": "tensors only in the checkpoint",
}


def latest_checkpoint(source: Path, needs_optimizer: bool) -> Path:
    """Return ``source`` itself if it is a checkpoint, else that of the run folder ``source`` to begin with. Collective.

    Raises:
        UserError: neither, or weights alone where an optimizer's state is needed.
    """
    kind = TRAINING if needs_optimizer else BEST
    if not (source / INFO_FILE).exists():
        found = [list_checkpoints(source / CHECKPOINTS_FOLDER, kind)[:1]]
        dist.broadcast_object_list(found)
        if not found[0]:
            raise UserError(
                f"warm_start={source}: no training checkpoint ({TRAINING}*) to take the optimizer from"
                if needs_optimizer
                else f"warm_start={source}: neither a checkpoint nor a run folder with best weights"
            )
        source = found[0][0]
    if needs_optimizer and read_info(source)["kind"] != "training":
        raise UserError(
            f"warm_start={source}: weights alone; warm_start_optimizer needs a training checkpoint ({TRAINING}*)"
        )
    return source


def _warm_start_optimizer(
    optimizer: CombinedOptimizer, folder: Path, maps: Mapping[str, RowMap], left: Collection[str]
) -> dict[str, Any]:
    """Take the state wherever it fits as weights do; rows without an old one begin without any, as in a new run.

    Args:
        left: weights that are fresh, whose state is so, too: of Adam's steps and a row's sums the size says nothing.
    """
    initialise_optimizer(optimizer)
    found = _match(optimizer_tensors(optimizer), folder, maps, OPTIMIZER)
    ours, theirs = _states(found.tensors), _states(found.stored)
    for name in found.kinds:
        which, _, weight = (owner := _owner(name)).partition(".")
        anywhere = COLLECTION.sub(".tables", owner)
        # TorchRec calls the first state of every optimizer momentum1: only all of them together tell Adam from Adagrad.
        if weight in left or (which == "fused" and ours[anywhere] != theirs.get(anywhere)):
            found.kinds[name] = "fresh"
    _take(found, folder)
    info = read_info(folder)
    steps = info["step"] + info["fitted"].get("steps_before", 0)
    optimizer.set_optimizer_step(steps)
    # A rank knows the state of the tables it holds.
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {n: "fresh" if k == "other_size" else k for n, k in found.kinds.items()})
    everywhere = dict(chain.from_iterable(kinds.items() for kinds in of_ranks))
    names = {kind: [n for n, k in everywhere.items() if k == kind] for kind in ("loaded", "grown", "mapped", "fresh")}
    report = {kind: len(of_kind) for kind, of_kind in names.items()}
    logger.info(
        f"  optimizer state after {steps} steps: " + ", ".join(f"{n} tensors {kind}" for kind, n in report.items() if n)
    )
    if names["fresh"]:
        logger.info(f"  left fresh: {', '.join(name.removeprefix(OPTIMIZER) for name in names['fresh'])}")
    return {**report, "steps": steps}


def _owner(name: str) -> str:
    """Return ``<which>.<weight>`` of ``optimizer/<which>.<weight>/<what>``."""
    return name.removeprefix(OPTIMIZER).rpartition("/")[0]


def _states(names: Iterable[str]) -> dict[str, set[str]]:
    """Return what optimizers keep of each weight, by its owner, whichever collection a table is in."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(COLLECTION.sub(".tables", _owner(name)), set()).add(name.rpartition("/")[2])
    return found


@dataclass
class _Match:
    """Says how the tensors of a model, or of an optimizer, fit those of a checkpoint.

    Attributes:
        tensors: those here.
        kinds: of each, ``loaded``, ``grown``, ``mapped``, ``fresh`` or ``other_size``.
        maps: of the mapped ones, the old row of each row.
        stored: size and dtype there, of all of this prefix, by the name here where there is one.
        there: of those here, the name there.
    """

    prefix: str
    tensors: Mapping[str, Tensor | ShardedTensor]
    kinds: dict[str, str]
    maps: dict[str, Tensor]
    stored: dict[str, tuple[torch.Size, torch.dtype]]
    there: dict[str, str]

    def of(self, kind: str) -> list[str]:
        return [name for name, found in self.kinds.items() if found == kind]

    def names(self, kind: str) -> list[str]:
        return [name.removeprefix(self.prefix) for name in self.of(kind)]

    @property
    def unused(self) -> list[str]:
        return [name.removeprefix(self.prefix) for name in self.stored if name not in self.tensors]

    def report(self) -> dict[str, Any]:
        taken = [name for kind in ("loaded", "grown", "mapped") for name in self.of(kind)]
        others = {name: self.stored[name][1] for name in taken if self.stored[name][1] != self.tensors[name].dtype}
        return {
            "loaded": self.names("loaded"),
            "grown": {name.removeprefix(self.prefix): self.stored[name][0][0] for name in self.of("grown")},
            "mapped": {
                name.removeprefix(self.prefix): f"{int((self.maps[name] >= 0).sum())} of {len(self.maps[name])}"
                for name in self.of("mapped")
            },
            "fresh": self.names("fresh"),
            "other_size": self.names("other_size"),
            "other_dtype": {name.removeprefix(self.prefix): str(dtype) for name, dtype in others.items()},
            "unused": self.unused,
        }


def _match(
    tensors: Mapping[str, Tensor | ShardedTensor], folder: Path, maps: Mapping[str, RowMap], prefix: str
) -> _Match:
    stored = {name: found for name, found in stored_tensors(folder).items() if name.startswith(prefix)}
    names = names_there(tensors, stored)
    stored |= {name: stored.pop(old) for name, old in names.items() if old in stored}
    kinds: dict[str, str] = {}
    used: dict[str, Tensor] = {}
    for name, value in tensors.items():
        feature = TASKS if TASKS in maps and OF_TASKS.search(name) else feature_of(name)
        here, there = value.size(), stored[name][0] if name in stored else None
        found = maps.get(feature) if feature is not None and len(here) else None
        if there is None or (feature == TASKS and found is not None and (found.rows < 0).all()):
            kinds[name] = "fresh"
        elif found is not None:
            # Of a column-wise shard's own row-wise state there is more than one value a row.
            fits = here[0] == len(found.rows) and there[0] == (found.old_size or there[0]) and here[1:] == there[1:]
            kinds[name] = "mapped" if fits else "other_size"
            used |= {name: found.rows} if fits else {}
        elif here == there:
            kinds[name] = "loaded"
        elif feature is not None and here[1:] == there[1:] and here[0] > there[0]:
            kinds[name] = "grown"
        else:
            kinds[name] = "other_size"
    return _Match(prefix, tensors, kinds, used, stored, names)


def _take(match: _Match, folder: Path) -> list[str]:
    """Fill the tensors here with what fits.

    Returns:
        names of those with a value on this rank that is finite there and not in the precision here.
    """
    wanted: dict[str, Tensor | ShardedTensor] = {name: match.tensors[name] for name in match.of("loaded")}
    for name in match.of("grown"):
        wanted[name] = first_rows(match.tensors[name], match.stored[name][0][0])
    dtypes = {name: match.stored[name][1] for name in match.kinds if name in match.stored}
    others = [name for name, value in wanted.items() if dtypes[name] != value.dtype]
    read = {name: with_dtype(value, dtypes[name]) if name in others else value for name, value in wanted.items()}
    read_checkpoint({match.there[name]: value for name, value in read.items()}, folder)
    too_large = [name for name in others if not round_into(wanted[name], read[name])]
    # One whole old table after the other: whose rows this rank needs is known only by value.
    for name in match.of("mapped"):
        size, dtype = match.stored[name]
        old = torch.empty(size, dtype=dtype)
        read_checkpoint({match.there[name]: old}, folder, alone=True)
        value, rows = match.tensors[name], match.maps[name]
        if isinstance(value, ShardedTensor):
            parts = [(s.tensor, (*s.metadata.shard_offsets, 0)) for s in value.local_shards()]
        else:
            parts = [(value, (0, 0))]
        for part, offsets in parts:
            if not round_into(part, taken(part, old, rows, offsets)):
                too_large.append(name)
    return too_large


def _refuse_parts_of_tasks(
    source: Path, model: nn.Module, weights: _Match, maps: Mapping[str, RowMap], here: Here
) -> None:
    """Refuse other labels where what is of a task, and fits, has no name to tell it by but its place."""
    if TASKS not in maps:
        return
    parts = [part for module in model.modules() if isinstance(module, OverArch) for part in module.task_parts]
    of_tasks = re.compile("|".join([r"\.heads\.per_domain\.", *(rf"(\.over_arch\.|@){part}\b" for part in parts)]))
    for name in (name for kind in ("loaded", "grown", "mapped") for name in weights.of(kind)):
        if of_tasks.search(name):
            raise UserError(
                f"warm_start={source}: its labels are not {', '.join(here.schema.labels)}, and "
                f"{'heads.per_domain' if '.per_domain.' in name else 'the over-arch'} has parts of each label that "
                "would be taken by their place; train the same labels (data.labels), or begin without"
            )


def _refuse_managed_ids(source: Path, weights: _Match) -> None:
    """Refuse managed tables whose ids have other rows there and here."""
    for name in (*weights.names("fresh"), *weights.names("other_size"), *weights.unused):
        _refuse_managed(source, name, "embeddings.managed differs; give it the same rows, or leave the feature out")
    for name in weights.of("mapped"):
        for managed in weights.tensors:
            if managed.endswith(f".{feature_of(name) or ''}{ROWS_OF_IDS}"):
                _refuse_managed(source, managed, "the dataset is another; leave the feature out")


def _refuse_managed(source: Path, name: str, reason: str) -> None:
    """Refuse a tensor that says which ids have a row of a managed table."""
    if name.endswith(ROWS_OF_IDS):
        feature = name.removesuffix(ROWS_OF_IDS).rpartition(".")[2]
        raise UserError(
            f"warm_start={source}: there and here the ids of feature {feature!r} have other rows, since {reason}"
        )
