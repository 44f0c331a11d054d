"""Writes a model repository of NVIDIA Triton beside an artifact: a config, and a model for its Python backend.

The model takes raw rows as JSON text, one an element, as ``POST /predict`` of our own server does, and gives each
task's probability. Triton batches requests; the artifact is read where it is when Triton loads the model.
"""

from __future__ import annotations

import json
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.serving.artifact import read_manifest

CONFIG_FILE = "config.pbtxt"
MODEL = '''"""Scores rows with an artifact of ssr_rec, which this backend's Python must have; see docs/serving.md."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from ssr_rec.serving import load


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.scorer = load(parameters["artifact"]["string_value"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        texts = pb_utils.get_input_tensor_by_name(request, "row").as_numpy().reshape(-1)
        try:
            found = self.scorer.predict([json.loads(text) for text in texts])
        except ValueError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)[:1000]))
        columns = [pb_utils.Tensor("p_" + name, np.ascontiguousarray(p[:, None])) for name, p in found.items()]
        return pb_utils.InferenceResponse(columns)
'''


def write_repository(artifact: Path, out: Path, name: str, max_batch: int = 1024) -> Path:
    """Write ``out/<name>``, with a config and version 1 of a model that scores with ``artifact``; return its folder.

    Args:
        max_batch: rows that Triton puts together.

    Raises:
        UserError: not an artifact, a name that is no plain word, or one that is there.
    """
    labels = read_manifest(artifact, check_files=False).dataset.labels
    if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
        raise UserError(f"name {name!r}: letters, digits, _ and - alone")
    folder = out / name
    if folder.exists():
        raise UserError(f"{folder}: already there; choose another folder or name")
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(MODEL)
    outputs = ",\n".join(
        f"  {{ name: {_quoted('p_' + label)}, data_type: TYPE_FP32, dims: [ 1 ] }}" for label in labels
    )
    (folder / CONFIG_FILE).write_text(
        f"name: {_quoted(name)}\n"
        'backend: "python"\n'
        f"max_batch_size: {max_batch}\n"
        'input [ { name: "row", data_type: TYPE_STRING, dims: [ 1 ] } ]\n'
        f"output [\n{outputs}\n]\n"
        "instance_group [ { kind: KIND_CPU, count: 1 } ]\n"
        "dynamic_batching { max_queue_delay_microseconds: 1000 }\n"
        f'parameters [ {{ key: "artifact", value: {{ string_value: {_quoted(str(artifact.resolve()))} }} }} ]\n'
    )
    return folder


def _quoted(text: str) -> str:
    # Text format takes the escapes of JSON, but for those of characters beyond ASCII.
    return json.dumps(text, ensure_ascii=False)
