"""Runs FuxiCTR's side of bench_fuxictr.py: ``python fuxictr_child.py FOLDER MODEL``, in a Python that has FuxiCTR.

FOLDER holds ``settings.json``, FuxiCTR's ``feature_map.json`` and the three splits in a format of its loaders. First
comes a line of JSON that says what was built; then every line on stdin is answered by one:

    {"steps": 150}               -> {"seconds": 1.9}               training of the same model goes on for 150 steps
    {"epochs": 10, "seed": 0}    -> {"auc": 0.79, "epochs": 3}     a new model, stopped early, and its test AUC

The wheel has FuxiCTR's layers, loaders and training loop but not these models, which are in its repository's
model zoo; they are put together here from the layers the zoo uses. Nothing of ssr_rec is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

# First of the libraries: where it is missing, the last line on stderr must be that.
import fuxictr  # noqa: F401  # isort: skip
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import (
    CrossNetV2,
    DIN_Attention,
    FactorizationMachine,
    FeatureEmbedding,
    FeatureEmbeddingDict,
    MLP_Block,
)
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything

MAX_GRADIENT_NORM = 10.0
"""The default of ``BaseModel.fit``, which sets it."""


class DeepFM(BaseModel):
    """Adds first order and FM (one layer in FuxiCTR) to a deep network with one output."""

    def __init__(self, feature_map: FeatureMap, settings: dict[str, Any], **options: Any) -> None:
        super().__init__(feature_map, **options)
        self.embedding_layer = FeatureEmbedding(feature_map, settings["dim"])
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(feature_map.sum_emb_out_dim(), hidden_units=settings["hidden"], output_dim=1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = self.get_inputs(inputs)
        fields = self.embedding_layer(ids)
        logits = self.fm(ids, fields) + self.mlp(fields.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logits)}


class DCNv2(BaseModel):
    """Puts a cross network of full rank beside a deep network, then one linear unit."""

    def __init__(self, feature_map: FeatureMap, settings: dict[str, Any], **options: Any) -> None:
        super().__init__(feature_map, **options)
        width, hidden = feature_map.sum_emb_out_dim(), settings["hidden"]
        self.embedding_layer = FeatureEmbedding(feature_map, settings["dim"])
        self.crossnet = CrossNetV2(width, settings["num_cross_layers"])
        self.parallel_dnn = MLP_Block(width, hidden_units=hidden)
        self.fc = torch.nn.Linear(width + hidden[-1], 1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fields = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        logits = self.fc(torch.cat([self.crossnet(fields), self.parallel_dnn(fields)], dim=-1))
        return {"y_pred": self.output_activation(logits)}


class DIN(BaseModel):
    """Puts a history's events, weighed against the target, in its field's place; then a deep network of one output."""

    def __init__(self, feature_map: FeatureMap, settings: dict[str, Any], **options: Any) -> None:
        super().__init__(feature_map, **options)
        self.target, self.history = settings["target"], settings["history"]
        self.embedding_layer = FeatureEmbeddingDict(feature_map, settings["dim"])
        self.attention = DIN_Attention(settings["dim"], settings["attention_hidden"], hidden_activations="Dice")
        self.mlp = MLP_Block(feature_map.sum_emb_out_dim(), hidden_units=settings["hidden"], output_dim=1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = self.get_inputs(inputs)
        fields = self.embedding_layer(ids)
        there = ids[self.history] != 0
        fields[self.history] = self.attention(fields[self.target], fields[self.history], there)
        logits = self.mlp(self.embedding_layer.dict2tensor(fields, flatten_emb=True))
        return {"y_pred": self.output_activation(logits)}


MODELS: dict[str, Any] = {"deepfm": DeepFM, "dcn_v2": DCNv2, "din": DIN}


class Job:
    """Trains one model of ``MODELS`` on the prepared folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.feature_map = FeatureMap("data", str(folder))
        self.feature_map.load(str(folder / "feature_map.json"), {"embedding_dim": self.settings["dim"]})
        self.model = self.build(seed=0)
        # What ``fit`` sets before its first epoch; it never evaluates here.
        self.model._max_gradient_norm = MAX_GRADIENT_NORM
        self.model._stop_training, self.model._total_steps, self.model._eval_steps = False, 0, sys.maxsize
        # A new pass over the loader, with its shuffling and workers, after each epoch, as in ``fit``.
        self.batches = chain.from_iterable(repeat(self.loader("train")))

    def build(self, seed: int) -> BaseModel:
        seed_everything(seed)
        model = MODELS[self.name](
            self.feature_map,
            self.settings,
            model_id=self.name,
            model_root=str(self.folder),
            metrics=["AUC"],
            monitor="AUC",
            early_stop_patience=1,
            verbose=0,
        )
        model.compile("adam", "binary_crossentropy", self.settings["learning_rate"])
        model.reset_parameters()
        model.model_to_device()
        os.makedirs(model.model_dir, exist_ok=True)
        return model

    def loader(self, split: str) -> Any:
        stage, key = ("test", "test_data") if split == "test" else ("train", "train_data")
        options = {key: str(self.folder / f"{split}.{self.settings['loader']}")}
        found = RankDataLoader(
            self.feature_map,
            stage=stage,
            batch_size=self.settings["batch_size"],
            shuffle=split == "train",
            data_format=self.settings["loader"],
            num_workers=self.settings["workers"],
            **options,
        )
        return found if split == "test" else found[0]

    def train(self, steps: int) -> float:
        """Run FuxiCTR's own ``train_epoch`` over the next batches and return the seconds."""
        start = time.perf_counter()
        self.model.train_epoch(islice(self.batches, steps))
        return time.perf_counter() - start

    def fit(self, epochs: int, seed: int) -> dict[str, float]:
        """Train from scratch until the validation AUC falls; ``evaluate`` is scikit-learn's AUC."""
        model = self.build(seed)
        model.fit(self.loader("train"), epochs=epochs, validation_data=self.loader("validation"))
        return {"auc": float(model.evaluate(self.loader("test"))["AUC"]), "epochs": model._epoch_index + 1}


def main() -> None:
    # The answers get stdout for themselves; what the libraries print joins stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job(Path(sys.argv[1]), sys.argv[2])
    torch.set_num_threads(job.settings["threads"])
    dense = [p for name, p in job.model.named_parameters() if "embedding_layer." not in name]
    built = {
        "dense_parameters": sum(p.numel() for p in dense),
        "versions": {name: metadata.version(name) for name in ("fuxictr", "torch")},
    }
    print(json.dumps(built), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"seconds": job.train(request["steps"])} if "steps" in request else job.fit(**request)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
