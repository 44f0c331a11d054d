"""The repository for NVIDIA Triton: its config as Triton's own messages read it, its model on a stand-in backend."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ssr_rec.serving.triton_repository import write_repository
from tests.serving.test_delta import make_artifact


@pytest.fixture
def repository(tmp_path: Path, dataset: Path) -> Path:
    artifact = make_artifact(tmp_path / 'an "artifact" é', dataset, np.zeros((5, 4), np.float32), b"x")
    return write_repository(artifact, tmp_path / "models", "ssr-s_1", 64)


def test_the_config_is_one_of_triton(repository: Path) -> None:
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    config = text_format.Parse((repository / "config.pbtxt").read_text(), messages.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (repository.name, "python", 64)
    (given,) = config.input
    assert (given.name, given.data_type, list(given.dims)) == ("row", messages.TYPE_STRING, [1])
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        (name, messages.TYPE_FP32, [1]) for name in ("p_click", "p_like")
    ]
    assert config.parameters["artifact"].string_value == str(repository.parents[1] / 'an "artifact" é')
    assert config.HasField("dynamic_batching")


def test_the_model_answers_each_request_with_its_rows(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = ModuleType("triton_python_backend_utils")
    backend.Tensor = lambda name, array: (name, array)
    backend.TritonError = str
    backend.InferenceResponse = lambda tensors, error=None: (dict(tensors), error)
    backend.get_input_tensor_by_name = lambda request, name: SimpleNamespace(as_numpy=lambda: request[name])
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    spec = importlib.util.spec_from_file_location("triton_model", repository / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = []

    def predict(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return {"click": np.array([row["user"] for row in rows], np.float32)}

    monkeypatch.setattr(module, "load", lambda path: loaded.append(path) or SimpleNamespace(predict=predict))
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": {"artifact": {"string_value": "somewhere"}}})})
    rows = [np.array([[b'{"user": 3}'], [b'{"user": 4}']], object), np.array([[b"{"]], object)]
    good, bad = model.execute([{"row": one} for one in rows])
    assert loaded == ["somewhere"] and good[1] is None and good[0]["p_click"].tolist() == [[3.0], [4.0]]
    assert bad[0] == {} and "Expecting property name" in bad[1]


def test_what_cannot_be_written_is_refused(repository: Path, tmp_path: Path) -> None:
    artifact = tmp_path / 'an "artifact" é'
    for name, message in (("a/b", "letters, digits"), ("", "letters, digits"), ("ssr-s_1", "already there")):
        with pytest.raises(ValueError, match=message):
            write_repository(artifact, tmp_path / "models", name)
    with pytest.raises(ValueError, match="not an artifact"):
        write_repository(tmp_path, tmp_path / "models", "x")
