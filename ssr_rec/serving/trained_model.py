"""Restores a run's trained model on one process: plain tables and the eager over-arch, whatever ranks trained it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from ssr_rec.checkpointing.format import INFO_FILE, read_checkpoint, stored_tensors, verify
from ssr_rec.checkpointing.manager import BEST, CHECKPOINTS_FOLDER, TRAINING, list_checkpoints
from ssr_rec.checkpointing.train_state import MODEL, OPTIMIZER
from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import place
from ssr_rec.config.run import RunConfig, load_config
from ssr_rec.data.schema import Schema
from ssr_rec.data.synthetic.write import ensure_synthetic
from ssr_rec.embeddings.evicting_tables import managed_ids
from ssr_rec.embeddings.histories import reading_of
from ssr_rec.embeddings.tables import plain_tables
from ssr_rec.embeddings.weighted_ids import WeightedIds
from ssr_rec.metrics.links import Links
from ssr_rec.model.build import build_dense
from ssr_rec.model.ctr_model import CTRModel, running_statistics
from ssr_rec.model.losses.registry import build_losses
from ssr_rec.model.vector_fields import fill_vectors
from ssr_rec.runs.folder import CONFIG_FILE
from ssr_rec.runs.report import REPORT_FILE, read_report
from ssr_rec.training.averaging import AVERAGE

TASK = f"{MODEL}model."
"""Prefix of the names of a ``CTRModel``'s tensors in a checkpoint: that of ``TrainTask`` within a run's."""
LOSSES = f"{MODEL}loss.losses."
"""Prefix of the tensors of the tasks' losses."""


class Restored(NamedTuple):
    model: CTRModel
    """In eval mode, on the CPU: ``model(sparse: KeyedJaggedTensor of B rows) -> (B, T)``."""
    schema: Schema
    """The features and labels of the run, in its order."""
    config: RunConfig
    data: Path
    """The prepared dataset."""
    checkpoint: Path
    links: Links
    """Task whose label is a number -> how its logits become predictions."""


def restore_model(run: str | Path, data: str | Path | None = None) -> Restored:
    """Return the best weights of a run, finished or not, trained by any number of ranks. Needs no process group.

    Args:
        run: the run folder; or one of its checkpoints, whose weights are taken.
        data: where the prepared dataset is now; None: where the run's config says.

    Raises:
        UserError: no such run, no good best weights in it, or not the dataset that it was trained on.
    """
    checkpoint, run = Path(run), run_folder(run)
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run}: not a run folder, it has no {CONFIG_FILE}")
    config = load_config(run / CONFIG_FILE)
    if checkpoint == run:
        checkpoint = best_checkpoint(run)
    if data is None and config.data.path is None:
        folder = ensure_synthetic(config.data.synthetic, Path(config.data.synthetic_root))
    else:
        folder = place(data or config.data.path or "")
    schema = Schema.read(folder).select(config.data.features, config.data.labels)
    if (run / REPORT_FILE).is_file():
        trained_on = str(read_report(run).dataset.dataset_id)
        if trained_on not in schema.same_tables_ids:
            grown = ", before its vocabularies were extended: warm-start a run on it" * (trained_on in schema.known_ids)
            raise UserError(f"{folder}: dataset {schema.dataset_id}, the run {run} was trained on {trained_on}{grown}")
    model = build_plain_model(config, schema)
    load_plain_weights(model, checkpoint)
    fill_vectors(model.dense.vectors, schema, folder)
    return Restored(model, schema, config, folder, checkpoint, trained_links(config, schema, checkpoint))


def trained_links(config: RunConfig, schema: Schema, checkpoint: Path) -> Links:
    """Return how the logits of tasks whose labels are numbers become predictions, by the losses that were trained.

    Of a training checkpoint by their averages, where the run keeps such, as ``load_plain_weights``.

    Raises:
        UserError: what ``build_losses`` refuses, or a checkpoint without a loss's tensors.
    """
    if not schema.numbers:
        return {}
    losses = build_losses(config.train, schema)
    state, stored = losses.state_dict(), stored_tensors(checkpoint)
    averages = {name: f"{OPTIMIZER}dense.loss.losses.{name}/{AVERAGE}" for name in state}
    places = {name: there if there in stored else LOSSES + name for name, there in averages.items()}
    if state:
        read_checkpoint({places[name]: value for name, value in state.items()}, checkpoint)
        losses.load_state_dict(state)
    return losses.links()


def run_folder(path: str | Path) -> Path:
    """Return the run folder that ``path`` is, or that it is a checkpoint of."""
    path = Path(path)
    return path.absolute().parents[1] if (path / INFO_FILE).is_file() else path


def latest_of_days(run: Path) -> Path:
    """Return the latest checkpoint of a run by days; ``run`` itself of any other, whose best weights are the ones.

    Raises:
        UserError: a run by days without a training checkpoint.
    """
    if not (run / CONFIG_FILE).is_file() or load_config(run / CONFIG_FILE).data.days is None:
        return run
    found = list_checkpoints(run / CHECKPOINTS_FOLDER, TRAINING)
    if not found:
        raise UserError(
            f"{run / CHECKPOINTS_FOLDER}: no training checkpoint ({TRAINING}*), and of a run by days the best weights "
            f"({BEST}*) are those of its easiest day; name the folder of those to take them all the same"
        )
    return found[0]


def best_checkpoint(run: Path) -> Path:
    """Return the folder of a run's best weights.

    Raises:
        UserError: there is none.
    """
    folder = run / CHECKPOINTS_FOLDER
    found = list_checkpoints(folder, BEST)
    if (run / REPORT_FILE).is_file():
        # An earlier, interrupted part of the run may have left others.
        step = read_report(run).best_step
        found = [path for path in found if step is not None and path.name == f"{BEST}{step:09d}"]
    if not found:
        raise UserError(f"{folder}: no best weights ({BEST}*); the run has not evaluated yet, or they were deleted")
    return found[0]


def build_plain_model(config: RunConfig, schema: Schema) -> CTRModel:
    """Return the unsharded model of a config in eval mode, on the CPU, with fresh over-arch weights by its seed.

    Its tables are drawn by TorchRec, not as a run would begin with, and fp32 whatever those of the run are: unlike
    FBGEMM's kernels, PyTorch's would add up the ids of a list in the precision of the table.
    """
    embeddings = config.embeddings.model_copy(update={"dtype": "fp32", "dtypes": {}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dense = build_dense(config, schema)
        reading = reading_of(schema, config.sequences)
        tables = plain_tables(schema, embeddings, torch.device("cpu"), dense.over_arch.extra_tables, reading)
    managed = managed_ids(schema, config.embeddings, config.train.batch_size, config.seed, torch.device("cpu"))
    return CTRModel(tables, dense, managed, WeightedIds.of(schema, embeddings.pooling)).eval()


def load_plain_weights(model: CTRModel, checkpoint: Path) -> None:
    """Read all weights of an unsharded model from a checkpoint that any number of ranks wrote.

    Of a training checkpoint they are what an evaluation would have used: the dense weights' averages, where the run
    keeps such, and the mean of the ranks' running statistics.

    Raises:
        UserError: not a good checkpoint, or one of another model.
    """
    verify(checkpoint)
    state, stored = model.state_dict(), stored_tensors(checkpoint)
    halves = [name for name in state if stored.get(TASK + name, (None, None))[1] == torch.float16]
    read = {name: torch.empty_like(v, dtype=torch.float16) if name in halves else v for name, v in state.items()}
    averages = {name: f"{OPTIMIZER}dense.model.{name}/{AVERAGE}" for name in state}
    averages = {name: there for name, there in averages.items() if there in stored}
    read_checkpoint({averages.get(name, TASK + name): value for name, value in read.items()}, checkpoint)
    for name, value in running_statistics(model).items():
        own = [there for there in stored if re.fullmatch(rf"rank\d+/model\.{re.escape(name)}", there)]
        if own:
            of_ranks = {there: torch.empty_like(value) for there in own}
            read_checkpoint(of_ranks, checkpoint)
            read[name] = torch.stack(list(of_ranks.values())).mean(0)
    model.load_state_dict({name: value.to(state[name].dtype) for name, value in read.items()})
