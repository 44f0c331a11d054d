"""The planner against runs that others published: each is predicted by constants that are fitted to the other runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ssr_rec.planning.dlrm import dlrm_cost
from ssr_rec.planning.hardware import Assumptions
from ssr_rec.planning.published import PlannedRun, fit, fitted, held_out, plan_runs, read_runs
from tools.check_planner import compare, markdown

WITHIN = {"besthub": 1.5}
"""Source -> range of its hardware; 1.4 for the A100 runs."""


@pytest.fixture(scope="module")
def runs() -> list[PlannedRun]:
    return plan_runs(read_runs())


@pytest.mark.slow
def test_held_out_runs_are_within_the_range_that_reports_give(runs: list[PlannedRun]) -> None:
    off = {}
    for run, ratio in zip(runs, held_out(runs), strict=True):
        off[run.run.name, run.run.source] = max(ratio, 1 / ratio)
        assert off[run.run.name, run.run.source] < WITHIN.get(run.run.source, 1.4), run.run
        assert run.planned.estimate.within == WITHIN.get(run.run.source, 1.4)
        assert run.planned.fits
    assert len(off) == 10
    assert sum(ratio < 1.27 for ratio in off.values()) == 9
    assert math.exp(sum(map(math.log, off.values())) / len(off)) < 1.15


@pytest.mark.slow
def test_the_page_has_the_table_of_these_runs(runs: list[PlannedRun]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    for line in markdown(compare(runs)).splitlines():
        assert line in page


@pytest.mark.slow
def test_the_constants_of_hardware_are_those_fitted_to_the_runs(runs: list[PlannedRun]) -> None:
    found = fitted(fit([run for run in runs if run.run.calibrates]))
    assert fitted(Assumptions()) == pytest.approx(found, rel=0.03)


@pytest.mark.slow
def test_a_wrong_fit_would_show(runs: list[PlannedRun]) -> None:
    """A host that takes no time was the old model's error: small batches then look several times as fast."""
    free = Assumptions(host_step_ms=0, host_way_ms=0, host_operator_us=0, host_table_us=0)
    assert runs[0].samples_per_s(free) > 5 * runs[0].run.samples_per_s


def test_a_dlrm_by_hand() -> None:
    """Products: 2 operations a weight and row, and of 27 vectors with one another; one bias an output."""
    dense = [(13, 512), (512, 256), (256, 128)]
    over = [(128 + 27 * 26 // 2, 1024), (1024, 1024), (1024, 512), (512, 256), (256, 1)]
    cost = dlrm_cost(26, "dot", "sgd")
    assert cost.parameters == sum(a * b + b for a, b in dense + over)
    assert cost.matmul_flops == 2 * sum(a * b for a, b in dense + over) + 2 * 27 * 27 * 128
    wide = 27 * 128
    over[0] = (wide, 1024)
    crossed = dlrm_cost(26, "dcn", "adagrad")
    assert crossed.parameters == sum(a * b + b for a, b in dense + over) + 3 * (2 * 512 * wide + wide)
    assert crossed.matmul_flops == 2 * sum(a * b for a, b in dense + over) + 3 * 2 * 2 * 512 * wide
    # SGD's two operators for each of 16 tensors; forward at least a product and an activation for each of 8 layers.
    assert cost.operators > 3 * 15 + 2 * 16
    assert crossed.operators > cost.operators + 5 * 16
