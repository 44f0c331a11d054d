"""A warm start of a run with a domain: what is of a value follows the value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_rec.checkpointing.format import write_checkpoint
from ssr_rec.checkpointing.train_state import model_tensors
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.checkpointing.warm_start import warm_start
from ssr_rec.data.schema import Schema
from tests.cases import one_quick
from tests.checkpointing.test_warm_values import datasets, values
from tests.jobs import built_model
from tests.ranks import run_ranks

__all__ = ["datasets"]
OPTIONS = ["--domain=item", "--heads={per_domain: true, hidden: [4]}", "--embeddings.dim=8"]
OPTIONS += ["--over_arch={name: ssr, num_views: 2, view_dim: 4, domain_views: 1}"]


def of_domains(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items() if ".per_domain." in name}


def warm_job(old: str, new: str, folder: str, more: list[str]) -> tuple[dict, dict, dict, dict]:
    """The report, and what there is of domains: in the old run, in the new one before, and after."""
    before = built_model([*OPTIONS, *more[:1], f"--data.path={old}"], old)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, value in before.state_dict().items():
            if ".per_domain." in name and value.is_floating_point():
                value.copy_(torch.randn_like(value))
    info = {"kind": "weights", "step": 1, "dataset_id": Schema.read(old).dataset_id}
    write_checkpoint(model_tensors(before), {**info, "config": {"data": {"path": old}}}, Path(folder))
    model = built_model([*OPTIONS, *more, "--seed=7"], new)  # the last of the options that are given twice
    fresh = of_domains(model)
    report = warm_start(model, Path(folder), Here(Path(new), Schema.read(new)))
    return report, of_domains(before), fresh, of_domains(model)


@pytest.mark.parametrize("column", one_quick("kind", "item"))
def test_weights_of_a_domain_follow_its_value(datasets, tmp_path, column: str) -> None:
    """Items have other ids there, and one kind is new here."""
    old, new = datasets
    more = [f"--domain={column}"]
    report, there, fresh, here = run_ranks(warm_job, 1, str(old), str(new), str(tmp_path / "saved"), more)[0]
    before, now = values(old, column), values(new, column)
    assert set(now) > set(before) if column == "kind" else any(now[value] != before[value] for value in before)
    assert len(here) == 14 and {name for name in report["mapped"] if ".per_domain." in name} == set(here)
    for name, value in here.items():
        for text, row in now.items():
            wanted = there[name][before[text]] if text in before else fresh[name][row]
            assert np.array_equal(value[row], wanted), (name, text)


def test_those_of_another_column_are_left(datasets, tmp_path) -> None:
    old, new = datasets
    more = ["--domain=item", "--domain=kind"]
    report, _, fresh, here = run_ranks(warm_job, 1, str(old), str(new), str(tmp_path / "saved"), more)[0]
    assert all(".per_domain.kind." in name for name in here) and set(here) <= set(report["fresh"])
    assert all(np.array_equal(here[name], fresh[name]) for name in here)


def test_more_values_of_the_same_dataset_keep_the_rows_they_had(dataset, tmp_path) -> None:
    report, there, _, here = run_ranks(warm_job, 1, str(dataset), str(dataset), str(tmp_path / "saved"), [])[0]
    assert set(here) <= set(report["loaded"]) and all(np.array_equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("model/model.dense.heads.per_domain.tab.weight", "per_domain.tab"),
        ("optimizer/model.dense.over_arch.layers.0.per_domain.a/b.dense.weight/exp_avg", "per_domain.a/b"),
        ("model/model.dense.over_arch.layers.0.fusion.dense.weight", None),
        ("model/model.tables.embedding_bags.a/b.weight", "a/b"),
    ],
)
def test_a_name_says_whose_rows_a_tensor_has(name: str, feature: str | None) -> None:
    from ssr_rec.checkpointing.warm_start import feature_of

    assert feature_of(name) == feature
