"""A warm start onto other labels: a head is taken by its label's name, and nothing by its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ssr_rec.checkpointing.format import write_checkpoint
from ssr_rec.checkpointing.train_state import MODEL, initialise_optimizer, model_tensors, optimizer_tensors
from ssr_rec.checkpointing.warm_rows import TASKS, Here, Origin, _labels
from ssr_rec.checkpointing.warm_start import _Match, _refuse_managed_ids, warm_start
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.setup import start_process_group
from tests.model.test_losses import SCHEMA
from tests.ranks import run_ranks

OPTIONS = ["--embeddings.dim=4", "--heads.hidden=[3]", "--train.task_weighting=uncertainty"]
MLP = ["--over_arch={name: mlp, hidden: [5]}"]
TABLE = "model.tables.embedding_bags.{}.weight"
Heads = dict[str, np.ndarray]


def made(dataset: str, labels: list[str], more: list[str], seed: int) -> tuple[torch.nn.Module, Schema]:
    config = load_config(None, [*OPTIONS, *more, f"--seed={seed}"])
    schema = Schema.read(dataset).select(None, labels)
    model = build_model(config, schema, start_process_group(config.device), 1, 1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if ".heads." in name or "variances" in name:
                value.copy_(torch.randn_like(value))
    return model, schema


def heads(model: torch.nn.Module) -> Heads:
    state = model.state_dict().items()
    return {name: value.numpy().copy() for name, value in state if ".heads." in name or "variances" in name}


def labels_job(dataset: str, folder: str, before: list[str], now: list[str], more: list[str]) -> Any:
    """What the heads were there, what they were and are here, and the report; or with which message it is refused."""
    there, schema = made(dataset, before, more, 0)
    info = {"kind": "weights", "step": 1, "dataset_id": schema.dataset_id}
    write_checkpoint(model_tensors(there), {**info, "config": {"data": {"labels": before}}}, Path(folder))
    model, schema = made(dataset, now, more, 1)
    fresh = heads(model)
    try:
        report = warm_start(model, Path(folder), Here(Path(dataset), schema))
    except UserError as error:
        return str(error)
    return heads(there), fresh, heads(model), report


@pytest.mark.parametrize(
    ("before", "now"),
    [(["click"], ["like"]), (["click"], ["like", "click"]), (["click", "like"], ["like"]), (["like"], ["like"])],
)
def test_a_head_is_that_of_its_label(dataset: Path, tmp_path: Path, before: list[str], now: list[str]) -> None:
    arguments = str(dataset), str(tmp_path / "saved"), before, now, MLP
    there, fresh, here, report = run_ranks(labels_job, 1, *arguments)[0]
    assert len(here) == 5  # a tower's weight and bias, a head's, and the uncertainties
    for name, value in here.items():
        for place, label in enumerate(now):
            wanted = there[name][before.index(label)] if label in before else fresh[name][place]
            assert np.array_equal(value[place], wanted), (name, label)
    taken = "loaded" if before == now else "mapped" if set(before) & set(now) else "fresh"
    assert set(here) <= set(report[taken])
    assert any(".over_arch." in name for name in report["loaded"]) and not report["other_size"]


DEEPFM = ["--over_arch={name: deepfm, hidden: [5]}"]
EXPERTS = "expert_hidden: [4], tower_hidden: []"
PLE = [f"--over_arch={{name: ple, num_levels: 1, num_task_experts: 1, num_shared_experts: 2, {EXPERTS}}}"]
MMOE = [f"--over_arch={{name: mmoe, num_experts: 2, {EXPERTS}}}"]


@pytest.mark.parametrize(
    ("now", "more"),
    [
        (["like"], DEEPFM),
        (["like", "click"], DEEPFM),  # tables of the first order have four columns for one, two and four tasks
        (["like", "click"], PLE),  # so has a task's gate the same size for any number of them
        (["like"], [*MLP, "--heads.per_domain=true", "--domain=user"]),
    ],
)
def test_parts_of_a_task_without_its_name_are_not_taken_by_their_place(
    dataset: Path, tmp_path: Path, now: list[str], more: list[str]
) -> None:
    arguments = str(dataset), str(tmp_path / "saved"), ["click"], now, more
    said = run_ranks(labels_job, 1, *arguments)[0]
    assert f"its labels are not {', '.join(now)}, and" in said
    assert "parts of each label that would be taken by their place" in said


def test_parts_of_tasks_that_are_of_another_size_begin_anew(dataset: Path, tmp_path: Path) -> None:
    arguments = str(dataset), str(tmp_path / "saved"), ["click"], ["like", "click"], MMOE
    there, _, here, report = run_ranks(labels_job, 1, *arguments)[0]
    assert any(name.endswith(".over_arch.gates.weight") for name in report["other_size"])
    assert any(".over_arch.experts." in name for name in report["loaded"])
    for name, value in here.items():
        assert np.array_equal(value[1], there[name][0]), name


def test_a_feature_of_any_name_is_told_from_the_labels(dataset: Path, tmp_path: Path) -> None:
    """Its table and the heads would have each other's rows mapped, and begin anew for not being of that size."""
    schema = Schema.read(dataset)
    features = [schema.features[0].model_copy(update={"name": "tasks"}), *schema.features[1:]]
    renamed = tmp_path / "renamed"
    shutil.copytree(dataset, renamed)
    schema.model_copy(update={"features": features}).write(renamed)
    there, _, here, report = run_ranks(
        labels_job, 1, str(renamed), str(tmp_path / "saved"), ["click"], ["like", "click"], MLP
    )[0]
    assert TABLE.format("tasks") in report["loaded"] and not report["other_size"]
    assert all(np.array_equal(value[1], there[name][0]) for name, value in here.items())


def optimizer_job(dataset: str, folder: str) -> tuple[dict[str, float], Any]:
    """The state of each weight's optimizer, which was 7 throughout, after a start that can take but some weights."""
    more = [*MLP, "--heads.hidden=[]"]
    there, schema = made(dataset, ["click"], more, 0)
    state = optimizer_tensors(optimizer_of(there))
    for value in state.values():
        for part in [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]:
            part.fill_(7)
    info = {"kind": "training", "step": 5, "position": {"dataset_id": schema.dataset_id}, "fitted": {"seconds": 1}}
    tensors = {**model_tensors(there), **state}
    write_checkpoint(tensors, {**info, "config": {"data": {"labels": ["click"]}}}, Path(folder))
    model, schema = made(dataset, ["like"], [*more, "--embeddings.dims={item: 8}"], 1)
    optimizer = optimizer_of(model)
    report = warm_start(model, Path(folder), Here(Path(dataset), schema), optimizer)
    found = {}
    for name, value in optimizer_tensors(optimizer).items():
        parts = [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        found[name] = float(torch.cat([part.flatten() for part in parts]).mean())
    return found, report


def optimizer_of(model: Any) -> Any:
    config = load_config(None, [*OPTIONS, *MLP])
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    initialise_optimizer(optimizer)
    return optimizer


def test_what_is_fresh_has_no_state_of_the_old_optimizer(dataset: Path, tmp_path: Path) -> None:
    state, report = run_ranks(optimizer_job, 1, str(dataset), str(tmp_path / "step-000000005"))[0]
    left = {*report["fresh"], *report["other_size"]}
    assert {"model.dense.heads.weight", "model.dense.over_arch.layers.0.weight", TABLE.format("item")} <= left, left
    assert {"model.dense.over_arch.layers.0.bias", TABLE.format("user")} <= {*report["loaded"]}
    for name, mean in state.items():
        weight = next(one for one in (*left, *report["loaded"]) if f".{one}/" in name)
        assert (mean == 7) == (weight in report["loaded"]), (name, mean)


def test_managed_rows_are_those_of_their_ids_whatever_the_labels(dataset: Path, tmp_path: Path) -> None:
    more = [*MLP, "--embeddings.managed={user: {rows: 9}}"]
    arguments = str(dataset), str(tmp_path / "saved"), ["click"], ["like", "click"], more
    *_, report = run_ranks(labels_job, 1, *arguments)[0]
    assert {"model.managed.ids.user._mch_sorted_raw_ids", TABLE.format("user")} <= set(report["loaded"])


def test_managed_rows_that_would_move_away_from_their_ids_are_refused() -> None:
    tables, ids = [f"{MODEL}{TABLE.format(name)}" for name in ("user", "item")], f"{MODEL}model.managed.ids.user"
    tensors = {name: torch.zeros(9, 4) for name in tables} | {f"{ids}._mch_sorted_raw_ids": torch.zeros(9)}
    kinds = dict.fromkeys(tensors, "loaded")
    _refuse_managed_ids(Path("run"), _Match(MODEL, tensors, {**kinds, tables[1]: "mapped"}, {}, {}, {}))
    with pytest.raises(UserError, match="the ids of feature 'user' have other rows, since the dataset is another"):
        _refuse_managed_ids(Path("run"), _Match(MODEL, tensors, {**kinds, tables[0]: "mapped"}, {}, {}, {}))


def test_a_label_of_another_kind_is_another_label() -> None:
    binary = SCHEMA.model_copy(update={"numbers": []})
    assert len(SCHEMA.labels) > 1 and SCHEMA.numbers
    assert _labels(Origin("x", {}), SCHEMA, SCHEMA) == {}
    places = _labels(Origin("x", {}), SCHEMA, binary)[TASKS].rows.tolist()
    assert places == [-1 if label in SCHEMA.number_names else place for place, label in enumerate(SCHEMA.labels)]
