"""Writes an artifact's model as ONNX beside its compiled program, and proves that onnxruntime scores the same.

``model.onnx`` has its tables in the artifact's own files, ``onnx.json`` says what it takes and gives.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import Feature
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.model.ctr_model import DenseArch
from ssr_rec.runs.folder import write_json
from ssr_rec.sequences.hstu import HSTU
from ssr_rec.sequences.transformer import Transformer
from ssr_rec.serving.graph import Layout, ServingModel
from ssr_rec.serving.onnx_graph import OnnxModel, trace
from ssr_rec.serving.raw_rows import Encoded
from ssr_rec.serving.scorer import Scorer
from ssr_rec.serving.shared_lists import flat
from ssr_rec.serving.trained_model import Restored

ONNX_FILE = "model.onnx"
DESCRIPTION_FILE = "onnx.json"
OUTPUTS = ["logits", "predictions"]
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5
"""Largest difference of a probability from the artifact's that export accepts."""


def check_libraries() -> None:
    """Check that what writes and runs ONNX is installed.

    Raises:
        UserError: it is not.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'ssr_rec[onnx]', or make setup-onnx")


def make_onnx(restored: Restored, layout: Layout, tables: Mapping[str, torch.Tensor]) -> Any:
    """Return the model in operators of ONNX, an ``onnx_ir.Model``.

    Args:
        layout: of float32 tables.
        tables: name of each stack -> its rows.

    Raises:
        UserError: a part of the model has an operator that ONNX has not; the message names both.
    """
    schema, dense = restored.schema, restored.model.dense
    check_convertible(dense)
    names = [name for name, _ in _inputs(schema)]
    if twice := [name for name in names if (names + OUTPUTS).count(name) > 1]:
        raise UserError(
            f"two inputs or outputs of the ONNX graph would be called {twice[0]!r}: rename that feature and prepare "
            "the log again, or export without --onnx"
        )
    # It says that it has no torchvision.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    weighted = [schema.feature_names.index(feature.name) for feature in schema.weighted_lists]
    served = ServingModel(dense, layout, bf16=False, portable=True)
    program = trace(OnnxModel(served, list(tables.values()), weighted, schema.labels, restored.links).eval())
    try:
        found = torch.onnx.export(program, input_names=names, output_names=OUTPUTS, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(_refusal(restored, str(error))) from None
    assert found is not None
    from onnx_ir.passes.common import NameFixPass

    # Inputs got their names after all within the graph, some of which may be a feature's, such as "view".
    NameFixPass()(found.model)
    return found.model


def check_convertible(dense: DenseArch) -> None:
    """Check that no encoder has what is known not to be there in ONNX.

    Raises:
        UserError: names the encoder.
    """
    for history, encoder in dense.histories.pairs() if dense.histories is not None else ():
        if isinstance(encoder, HSTU | Transformer) and encoder.needs_ages:
            name = history.config.encoder.name
            key = "bias: position" if isinstance(encoder, HSTU) else "positions: index"
            raise UserError(
                f"ONNX cannot have encoder {name!r} of sequence {history.name!r}: it reads the bits of ages, for which "
                f"there is no operator; export without --onnx, or train with {key}"
            )


def _refusal(restored: Restored, message: str) -> str:
    """Return which model has an operator that ONNX has not."""
    unknown = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", message)
    why = f"there is no operator {unknown[1]}" if unknown else message.splitlines()[0]
    encoders = [f", encoder {one.encoder.name!r}" for one in restored.config.sequences.values()]
    parts = "".join([f"over_arch {restored.config.over_arch.name!r}", *encoders])
    return f"ONNX cannot have this model ({parts}): {why}; export without --onnx"


def write_onnx(model: Any, schema: Schema, stacks: Mapping[str, str], folder: Path) -> None:
    """Write ``model.onnx``, whose tables are those in ``folder``, and ``onnx.json``.

    Args:
        model: of ``make_onnx``.
        stacks: name of each stack -> its file in ``folder``.
    """
    import onnx_ir

    for place, file in enumerate(stacks.values()):
        value = model.graph.initializers.get(f"tables.{place}.weight")
        if value is None:
            continue  # nothing reads it
        with open(folder / file, "rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            assert dtype == np.float32
            where = {"location": file, "offset": stream.tell(), "length": 4 * int(np.prod(shape))}
        made = {"dtype": onnx_ir.DataType.FLOAT, "shape": onnx_ir.Shape(shape), "name": value.name}
        value.const_value = onnx_ir.ExternalTensor(**where, **made, base_dir=folder)
    onnx_ir.save(model, folder / ONNX_FILE)
    labels = len(schema.labels)
    outputs = [
        {"name": name, "type": "float32", "shape": ["rows", labels], "labels": schema.labels} for name in OUTPUTS
    ]
    described = {
        "format_version": 1,
        "model": ONNX_FILE,
        "opset": model.opset_imports[""],
        "inputs": [{"name": name, **values} for name, values in _inputs(schema)],
        "outputs": outputs,
    }
    write_json(folder / DESCRIPTION_FILE, described)


def _inputs(schema: Schema) -> list[tuple[str, dict[str, Any]]]:
    """Return name and description of each input of the graph, in order."""

    def ids(feature: Feature, holds: str, shape: str) -> dict[str, Any]:
        encoding = feature.encoding.model_dump(mode="json")
        found = {"type": "int64", "shape": [shape], "holds": holds, "feature": feature.name}
        return {**found, "num_embeddings": feature.num_embeddings, "encoding": encoding}

    singles = [one for one in schema.features if one.kind != "list"]
    lists = [one for one in schema.features if one.kind == "list"]
    found = [(one.name, ids(one, "id of each row", "rows")) for one in singles]
    for one in lists:
        of_items, holds = f"items of {one.name}", "ids of all rows' lists, one list after another"
        found.append((f"{one.name}.values", ids(one, holds, of_items) | {"max_length": one.max_length}))
        offsets = {"type": "int64", "shape": ["rows + 1"], "feature": one.name}
        holds = "0, then where each row's list ends among the values"
        found.append((f"{one.name}.offsets", {**offsets, "holds": holds}))
    for one in schema.weighted_lists:
        weights = {"type": "float32", "shape": [f"items of {one.name}"], "feature": one.name}
        found.append((f"{one.name}.weights", {**weights, "holds": "weight of each of the values"}))
    if width := sum(schema.dense_widths):
        columns = [column.model_dump(mode="json") for column in [*schema.dense, *schema.row_vectors]]
        numbers = {"type": "float32", "shape": ["rows", width], "holds": "scaled numbers, NaN where missing"}
        found.append(("dense", {**numbers, "columns": columns}))
    return found


def onnx_inputs(schema: Schema, encoded: Encoded) -> dict[str, np.ndarray]:
    """Return what ``model.onnx`` takes for rows that ``Scorer.encoder`` has encoded: name of each input -> array."""
    encoded = flat(encoded)
    arrays = [*encoded.ids, *chain.from_iterable(encoded.lists)]
    arrays += [one for one in encoded.weights or () if one is not None]
    arrays += [] if encoded.dense is None else [encoded.dense]
    return {name: array for (name, _), array in zip(_inputs(schema), arrays, strict=True)}


def compare_onnx(folder: Path, scorer: Scorer, reader: Reader, rows: int | None) -> dict[str, Any]:
    """Score a fold by onnxruntime and by the artifact; returns how far they are apart.

    Raises:
        UserError: a prediction differs by more than ``TOLERANCE``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    seen, worst = 0, 0.0
    batches = reader.epoch(0)
    deviations = np.array([_deviation(scorer.schema, label) for label in scorer.labels])
    for batch in batches:
        encoded = scorer.encoded(batch)
        (found,) = session.run(["predictions"], onnx_inputs(scorer.schema, encoded))
        wanted = np.stack(list(scorer.predict_encoded(encoded).values()), axis=1)
        differences = np.abs(found - wanted) / deviations
        # A comparison with NaN is false.
        worst = float(differences.max()) if not differences.max() <= worst else worst
        seen += len(found)
        if not worst <= TOLERANCE or (rows is not None and seen >= rows):
            break
    batches.close()
    if not worst <= TOLERANCE:
        raise UserError(
            f"onnxruntime's predictions differ from the artifact's by {worst:.2g}, more than {TOLERANCE:g}: export "
            "without --onnx, and report this"
        )
    return {"file": ONNX_FILE, "rows": seen, "max_difference": worst, "onnxruntime": onnxruntime.__version__}


def _deviation(schema: Schema, label: str) -> float:
    """Return the unit of a label's differences: of a number its standard deviation in training."""
    return next((number.std for number in schema.numbers if number.name == label), 1.0)
