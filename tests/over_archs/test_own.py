"""An over-arch from outside the package: named by its path, checked, trained on two ranks, resumed, exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import dump_config, load_config
from ssr_rec.over_archs.contract import check_over_arch
from ssr_rec.over_archs.registry import build_over_arch
from ssr_rec.runs.report import read_report, read_run
from ssr_rec.serving import load
from ssr_rec.serving.export import export_run
from tests.faults.harness import Job
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
OWN = '''
"""An over-arch of somebody else's."""

import torch
from torch import nn
from pydantic import BaseModel, Field

from ssr_rec.over_archs import Flops, OverArch


class Settings(BaseModel):
    width: int = Field(8, ge=1)


class Wide(OverArch):
    settings_class = Settings

    def __init__(self, num_fields, embedding_dim, num_tasks, settings):
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.layer = nn.Linear(self.in_features, settings.width)
        self.out_features = settings.width

    def forward(self, x):
        return torch.tanh(self.layer(x))

    def flops(self):
        return Flops(matmul=2 * self.in_features * self.out_features, elementwise=2 * self.out_features)


class OtherShape(Wide):
    def forward(self, x):
        return self.layer(x)[:, 1:]


class RowsTogether(Wide):
    def forward(self, x):
        return self.layer(x - x.mean(0))


class Unused(Wide):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unused = nn.Linear(2, 2)


class HiddenState(Wide):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shift = torch.randn(())

    def forward(self, x):
        return self.layer(x) + self.shift


class Draws(Wide):
    def forward(self, x):
        return self.layer(x) + 1e-6 * torch.randn(())


class WrongFlops(Wide):
    def flops(self):
        return Flops(matmul=1)


class Branches(Wide):
    def forward(self, x):
        return self.layer(x) if x.sum() < 1e9 else self.layer(2 * x)


class WithoutWidth(Wide):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        del self.out_features


class WithoutSettings(OverArch):
    def flops(self):
        return Flops()


not_a_class = 3
'''
BREACHES = {
    "OtherShape": "forward of 16 rows gives",
    "RowsTogether": "depends on the other rows",
    "Unused": "unused.weight gets no gradient",
    "HiddenState": "state_dict does not hold all",
    "Draws": "the other rows|another output",
    "WrongFlops": "torch counts 320",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module ``my_over_arch``."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_over_arch.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_over_arch", raising=False)
    return folder


def test_it_is_built_with_its_own_settings(own: Path) -> None:
    config = load_config(None, ["--over_arch={name: custom, path: 'my_over_arch:Wide', settings: {width: 3}}"])
    over_arch = build_over_arch(2, [4, 6], 1, config.over_arch)
    assert over_arch(torch.zeros(5, 10)).shape == (5, 3) and config.over_arch.label == "Wide"
    (own / "config.yaml").write_text(dump_config(config))
    assert load_config(own / "config.yaml") == config


@pytest.mark.parametrize(
    ("path", "settings", "says"),
    [
        ("my_over_arhc:Wide", {}, "cannot import my_over_arhc .*PYTHONPATH"),
        ("my_over_arch:Wid", {}, "my_over_arch has no Wid"),
        ("my_over_arch:not_a_class", {}, "must be a subclass of ssr_rec.over_archs.OverArch"),
        ("my_over_arch:Settings", {}, "must be a subclass of ssr_rec.over_archs.OverArch"),
        ("my_over_arch:WithoutSettings", {}, "must have a settings_class"),
        ("my_over_arch:WithoutWidth", {}, "has no out_features"),
        ("my_over_arch:Wide", {"width": 0}, "settings.width"),
    ],
)
def test_what_cannot_be_built_is_said(own: Path, path: str, settings: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_over_arch(path, settings)


def test_the_contract_is_checked(own: Path) -> None:
    check_over_arch("my_over_arch:Wide", {"width": 5})
    check_over_arch("my_over_arch:Wide", dims=(3, 1, 8))


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_of_the_contract_is_named(own: Path, name: str) -> None:
    with pytest.raises(AssertionError, match=BREACHES[name]):
        check_over_arch(f"my_over_arch:{name}")


def test_what_export_cannot_trace_is_found(own: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)data-dependent|control flow"):
        check_over_arch("my_over_arch:Branches")


def _find(rank: int, folder: str) -> None:
    """What PYTHONPATH does."""
    sys.path.insert(0, folder)


@pytest.mark.slow
def test_on_two_ranks_resumed_exported_and_scored(own: Path, dataset: Path, tmp_path: Path) -> None:
    options = [
        *("--over_arch={name: custom, path: 'my_over_arch:Wide', settings: {width: 6}}", f"--data.path={dataset}"),
        *("--train.batch_size=64", "--train.eval_every=4", "--train.log_every=1", "--embeddings.dim=4", "--device=cpu"),
        *("--checkpoint.every_steps=4", "--train.epochs=2", f"--runs={tmp_path}"),
    ]

    def train(ranks: int, *more: str) -> None:
        job = Job([*options, *more], ranks, tmp_path / "said", _find, str(own))
        assert job.wait() == [0] * ranks, job.said()[-3000:]

    # As docs/over_archs.md has it; then without the launcher's seconds.
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [sys.executable, *launcher, str(ROOT / "ssr_rec" / "train.py"), *options]
    path = os.pathsep.join([str(own), str(ROOT)])
    subprocess.run(
        [*command, "--name=whole", "--train.max_steps=8"], env={**os.environ, "PYTHONPATH": path}, check=True
    )
    train(2, "--name=half", "--train.max_steps=4")
    train(1, "--name=resumed", "--train.max_steps=8", f"--resume={tmp_path / 'half'}")
    whole, resumed = read_run(tmp_path / "whole"), read_run(tmp_path / "resumed")
    losses = [[row["loss"] for row in run.rows if row["split"] == "train"][-4:] for run in (whole, resumed)]
    assert np.allclose(*losses, rtol=0, atol=1e-5)
    export_run(tmp_path / "resumed", tmp_path / "artifact")
    rows = pd.read_parquet(dataset / "test" / "00000.parquet")
    scores = load(tmp_path / "artifact").predict(rows)["click"]
    assert scores.shape == (len(rows),) and scores.std() > 0
    assert read_report(tmp_path / "resumed").over_arch.kind == "Wide"
