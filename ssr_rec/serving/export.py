"""Makes an artifact of a run: packed tables, one ahead-of-time compiled program, and proof that it scores the same."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import LISTED
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.kernels import extension
from ssr_rec.metrics.number_metrics import evaluate_tasks
from ssr_rec.runs.provenance import git_commit, versions
from ssr_rec.serving.artifact import MODEL_FILE, TABLES_FOLDER, Machine, Manifest, Parity, new_artifact, write_manifest
from ssr_rec.serving.graph import Layout, ServingModel, make_layout, stacked_tables
from ssr_rec.serving.id_columns import index_folder, make_index
from ssr_rec.serving.onnx_export import check_libraries, compare_onnx, make_onnx, write_onnx
from ssr_rec.serving.quantized_tables import Precision
from ssr_rec.serving.scorer import MAX_ROWS, Scorer, predicted
from ssr_rec.serving.trained_model import Restored, latest_of_days, restore_model, run_folder
from ssr_rec.training.datasets import choose_days

TOLERANCES: dict[str, float] = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.01, "int4": 0.1, "bf16": 0.05}
"""Largest difference of a probability from the trainer's eager model that export accepts, by precision."""
BATCH_ROWS = 1_000

Note = Callable[[str], None]


class Compared(NamedTuple):
    """Names the rows on which an artifact must score as the trainer's eager model does."""

    split: str | None = None
    """None: the test split, of a run by days its last day."""
    rows: int | None = None
    """How many of them; None: all."""
    tolerance: float | None = None
    """Largest difference of a probability; None: ``TOLERANCES``."""


class Form(NamedTuple):
    """Says in what form an artifact has the model."""

    tables: Precision = "fp32"
    """How embedding rows are stored."""
    dense: Literal["fp32", "bf16"] = "fp32"
    """In what over-arch and heads compute; bf16 as training with ``train.bf16`` does."""
    onnx: bool = False
    """Whether it has an ONNX graph, too, which is float32."""

    def check(self) -> None:
        """Check that the form can be.

        Raises:
            UserError: ONNX of another precision, or without its libraries.
        """
        if self.onnx and (self.tables, self.dense) != ("fp32", "fp32"):
            raise UserError(f"--onnx is float32: leave out --tables {self.tables} and --dense {self.dense}")
        if self.onnx:
            check_libraries()


PLAIN_FORM = Form()


def export_run(
    run: str | Path,
    out: str | Path,
    form: Form = PLAIN_FORM,
    *,
    data: str | Path | None = None,
    compared: Compared | None = None,
    note: Note = lambda _: None,
) -> dict[str, Any]:
    """Export the weights of ``run`` to the artifact folder ``out``, which appears whole or not at all.

    They are the best ones. A run by days has them of the day that was the easiest, so that its latest are exported.

    Args:
        run: the run folder, or one of its checkpoints.
        form: precisions, and whether there is an ONNX graph.
        data: where the run's prepared dataset is now; None: where its config says.
        compared: the rows that the artifact must score as the trainer's eager model does; None: all of ``Compared``.

    Returns:
        the report: path, bytes, seconds, parity, measures.

    Raises:
        UserError: a form that cannot be, not a finished run with its dataset, a machine without a C++ compiler, or
            outputs that differ by more than the tolerance.
    """
    form.check()
    folder = run_folder(run)
    restored = restore_model(latest_of_days(folder) if folder == Path(run) else run, data)
    return export_restored(restored, folder.name, out, form, compared=compared, note=note)


def export_restored(
    restored: Restored,
    name: str,
    out: str | Path,
    form: Form = PLAIN_FORM,
    *,
    compared: Compared | None = None,
    note: Note = lambda _: None,
) -> dict[str, Any]:
    """Export a model in memory, trained or not, as ``export_run``; the artifact says that it is of the run ``name``."""
    form.check()
    if managed := list(restored.config.embeddings.managed):
        raise UserError(
            f"{name}: embeddings.managed: the ids of {', '.join(managed)} have the rows that training gave them, and "
            "an artifact has no place for that map; train with a vocabulary or hash_buckets to serve"
        )
    started = time.perf_counter()
    asked, rows, tolerance = compared or Compared()
    trained_on, split = _splits(restored, asked)
    reader = Reader(restored.data, restored.schema, split, BATCH_ROWS)
    if not extension.load():
        raise UserError("export needs a C++ compiler for ssr_rec's operators and the compiled program; see above")
    if tolerance is None:
        lossy = [form.tables, form.dense, "bf16" if restored.config.train.bf16 else "fp32"]
        tolerance = max(TOLERANCES[name] for name in lossy)
    with new_artifact(Path(out)) as folder:
        note("packing tables")
        layout = make_layout(restored.schema, restored.model.dense, restored.config.embeddings.pooling, form.tables)
        packed = stacked_tables(restored.model, restored.schema, layout)
        stacks = _write_tables(packed, folder)
        _copy_vocabularies(restored.schema, restored.data, folder)
        if form.onnx:
            note("making the ONNX graph")
            write_onnx(make_onnx(restored, layout, packed), restored.schema, stacks, folder)
        note("compiling")
        model = ServingModel(restored.model.dense, layout, form.dense == "bf16").eval()
        compile_model(model, list(packed.values()), folder / MODEL_FILE)
        values = _described(restored, name, split, tolerance) | {"tables": form.tables, "dense": form.dense}
        values["stacks"] = stacks
        values["trained_values"] = restored.schema.lookups_of(trained_on)
        note(f"comparing with the trainer's model on the {split} fold")
        scorer = Scorer(folder, Manifest.model_validate({**values, "files": {}}))
        values["parity"], values["measures"] = compare(restored, scorer, reader, rows, tolerance)
        onnx = {"onnx": compare_onnx(folder, scorer, reader, rows)} if form.onnx else {}
        manifest = write_manifest(folder, values)
    return {
        "artifact": str(out),
        "bytes": sum(int(size) for size, _ in manifest.files.values()),
        "table_bytes": sum(tensor.nbytes for tensor in packed.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "tables": form.tables,
        "dense": form.dense,
        "parity": manifest.parity.model_dump(),
        "measures": manifest.measures,
        **onnx,
    }


def _splits(restored: Restored, asked: str | None) -> tuple[list[str], str]:
    """Return the splits that the run was trained on, and the one to compare on.

    Raises:
        UserError: there is no such split.
    """
    schema, days = restored.schema, restored.config.data.days
    trained_on = choose_days(days or "all", schema.days.names) if schema.days else ["train"]
    split = asked or (trained_on[-1] if schema.days else "test")
    if split not in schema.splits:
        raise UserError(f"split {split!r}: the dataset has {', '.join(schema.splits)}")
    return trained_on, split


def _described(restored: Restored, name: str, split: str, tolerance: float) -> dict[str, Any]:
    """Return the manifest's entries of a run that was not compared yet."""
    parity = Parity(
        split=split, rows=0, max_difference=0, mean_difference=0, max_logit_difference=0, tolerance=tolerance
    )
    histories = restored.model.dense.histories
    return {
        "histories": [[c.name for c in history.columns] for history in histories.histories] if histories else [],
        "dataset": restored.schema.model_copy(update={"splits": {}, "ceiling": {}, "days": None, "additions": []}),
        "pooling": restored.config.embeddings.pooling,
        "over_arch": restored.config.over_arch.model_dump(mode="json"),
        "parity": parity,
        "links": dict(restored.links),
        "measures": {},
        "source": {
            "run": name,
            "checkpoint": restored.checkpoint.name,
            "versions": versions(),
            "git_commit": git_commit(),
        },
        "compiled_for": Machine.here(),
    }


def _write_tables(packed: dict[str, Tensor], folder: Path) -> dict[str, str]:
    (folder / TABLES_FOLDER).mkdir()
    files = {name: f"{TABLES_FOLDER}/{name}.npy" for name in packed}
    for name, file in files.items():
        np.save(folder / file, packed[name].numpy(), allow_pickle=False)
    return files


def _copy_vocabularies(schema: Schema, data: Path, folder: Path) -> None:
    for feature in schema.features:
        if isinstance(feature.encoding, LISTED):
            target = folder / feature.encoding.file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # features may share one
                shutil.copyfile(data / feature.encoding.file, target)
                make_index(target).write(index_folder(target))


def compile_model(model: ServingModel, tables: list[Tensor], path: Path) -> None:
    """Run ``torch.export`` for any number of rows and of lists that they share, then AOTInductor to ``path``.

    SSR's own operators stay calls of the C++ library: faster than what the compiler makes of their plain forms.
    """
    layout: Layout = model.layout
    batch, groups = 7, 5
    rows = Dim("rows", min=1, max=MAX_ROWS)
    names = {feature: number for number, feature in enumerate(layout.lists)}
    histories = model.histories.histories if model.histories is not None else ()
    for history in histories:
        first, *others = (layout.names.index(column.name) for column in history.columns)
        names.update(dict.fromkeys(others, names[first]))  # the columns of one sequence have as many lists and ids
    counts = {name: Dim(f"ids{name}", min=1, max=2**31 - 1) for name in names.values()}
    lists_of = {name: Dim(f"lists{name}", min=1, max=2**31 - 2) for name in names.values()}
    lists: list[Tensor] = []
    shapes: list[Any] = []
    for feature in layout.lists:
        lists += [torch.zeros(2 * groups, dtype=torch.int64), torch.arange(0, 2 * groups + 1, 2)]
        shapes += [{0: counts[names[feature]]}, {0: lists_of[names[feature]] + 1}]
    for feature in layout.weighted:
        lists.append(torch.ones(2 * groups))
        shapes.append({0: counts[names[feature]]})
    sharing = [torch.zeros(batch, dtype=torch.int64) for _ in layout.lists]
    sharing += [torch.zeros(2 * batch, dtype=torch.int64) for _ in histories]
    events = [Dim(f"events{number}", min=1, max=2**31 - 1) for number in range(len(histories))]
    of_sharing = [{0: dim} for dim in [*[rows] * len(layout.lists), *events]]
    ids = torch.zeros(len(layout.singles), batch, dtype=torch.int64)
    inputs: tuple[Any, ...] = (ids, lists, sharing, tables)
    dynamic: tuple[Any, ...] = ({1: rows}, shapes, of_sharing, [None] * len(tables))
    if model.dense_width:
        inputs, dynamic = (*inputs, torch.zeros(batch, model.dense_width)), (*dynamic, {0: rows})
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
        options = {"cpp.dynamic_threads": True}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def compare(
    restored: Restored, scorer: Scorer, reader: Reader, rows: int | None, tolerance: float
) -> tuple[Parity, dict[str, dict[str, dict[str, float | None]]]]:
    """Score a fold by the eager model and by the artifact.

    Predictions of labels that are numbers are compared in units of the label's standard deviation in training.

    Raises:
        UserError: a probability differs by more than ``tolerance``, or is not a number.
    """
    outputs: list[tuple[Tensor, ...]] = []
    seen = 0
    batches = reader.epoch(0)
    with torch.no_grad():
        for batch in batches:
            groups = batch.group_ids if batch.group_ids is not None else torch.empty(0, dtype=torch.int64)
            weights = batch.weights if batch.weights is not None else torch.ones_like(batch.labels)
            logits = restored.model(*batch.inputs)
            outputs.append((logits, scorer.score(batch), batch.labels, groups, weights))
            seen += len(batch.labels)
            if rows is not None and seen >= rows:
                break
    batches.close()
    eager, served, labels, groups, weights = (torch.cat(part)[:rows] for part in zip(*outputs, strict=True))
    links, schema = restored.links, restored.schema
    difference = (eager.sigmoid() - served.sigmoid()).abs()
    for number in schema.numbers:
        task = schema.labels.index(number.name)
        pair = (links[number.name].predict(logits[:, task].numpy()) for logits in (eager, served))
        difference[:, task] = torch.from_numpy(np.abs(np.subtract(*pair)) / number.std)
    worst = float(difference.max())
    if not worst <= tolerance:
        row, task = divmod(int(difference.nan_to_num(math.inf).argmax()), len(scorer.labels))
        mine, theirs = (predicted(part[[row]], scorer.labels, links) for part in (served, eager))
        label = scorer.labels[task]
        raise UserError(
            f"the artifact's {label} of row {row} of {reader.files.paths[0].parent.name} is "
            f"{mine[label][0]:.7f}, the trainer's {theirs[label][0]:.7f}: more than the "
            f"tolerance {tolerance:g} for {scorer.tables} tables and {scorer.dense}; choose a finer precision, or "
            "raise the tolerance"
        )
    parity = Parity(
        split=reader.files.paths[0].parent.name,
        rows=len(eager),
        max_difference=worst,
        mean_difference=float(difference.double().mean()),
        max_logit_difference=float((eager - served).abs().max()),
        tolerance=tolerance,
    )
    measures: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, logits in (("eager", eager), ("artifact", served)):
        grouped = groups.numpy() if len(groups) else None
        counted = weights.numpy() if restored.schema.has_weights else None
        found = evaluate_tasks(logits.numpy(), labels.numpy(), grouped, scorer.labels, links, counted)
        measures[name] = {
            task: {key: None if math.isnan(value) else float(value) for key, value in values.items()}
            for task, values in found.items()
        }
    return parity, measures
