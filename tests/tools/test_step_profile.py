"""Where a step goes: sums of kinds are the step, and each kind gets the operators that a hand-made step has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tools.step_profile import ELEMENTWISE, KINDS, OUTSIDE, profile_steps, profile_table

TOOLS = Path(__file__).parents[2] / "tools"


def test_kinds_add_up_to_the_step_and_take_what_is_theirs() -> None:
    layer = torch.nn.Linear(256, 256)
    optimizer = torch.optim.Adam(layer.parameters())
    x = torch.randn(512, 256)

    def job(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            z = layer(x).relu()
            torch.nn.functional.binary_cross_entropy_with_logits(z, torch.ones_like(z)).backward()
            optimizer.step()

    found = profile_steps(job, 5)
    kinds = found["kinds"]
    assert sum(v["forward"] + v["backward"] for v in kinds.values()) == pytest.approx(found["step"])
    assert set(kinds) <= {*(kind for kind, _ in KINDS), ELEMENTWISE, OUTSIDE}
    for kind in ("products", "loss and metrics", ELEMENTWISE):
        assert kinds[kind]["forward"] > 0 and kinds[kind]["backward"] > 0, kind
    assert kinds["optimizer"]["forward"] > 0 and kinds["optimizer"]["backward"] == 0
    assert "lookups" not in kinds and "collectives" not in kinds
    table = profile_table({"it": {**found, "products_alone": found["step"] / 2}})
    assert "| lookups | - |" in table and "| step over its products alone | 2.00 |" in table


@pytest.mark.slow
def test_the_command_profiles_over_archs_by_name(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("bench_training", TOOLS / "bench_training.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    over_archs = ["mlp:hidden=[16]", "ssr:num_views=2,view_dim=16"]
    arguments = ["--data", str(dataset), "--steps", "2", "--threads", "1", "--train.batch_size=64"]
    assert bench.main([*arguments, "--profile", *over_archs]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["found"]
    mlp, ssr = found
    assert (mlp, ssr) == ("Dense MLP 1x16", "SSR-S 2x16x2")
    for one in found.values():
        assert {"products", "lookups", "fused update", "optimizer"} <= set(one["kinds"])
    assert "filter and fuse" in found[ssr]["kinds"]
