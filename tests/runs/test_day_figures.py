"""Tables and pictures of runs by days."""

import json
from pathlib import Path

import matplotlib.image
import pytest

from ssr_rec.runs.days import days_table, draw_days
from ssr_rec.runs.report import Report, Run
from tools.show_runs import main

DAYS = ["2024-02-28", "2024-02-29", "2024-03-01"]


def report(kind: str, aucs: list[float], days: list[str] = DAYS, gauc: bool = True) -> dict:
    def measures(auc: float) -> dict:
        return {"auc": auc, "ne": 0.9, "calibration": 1.02, **({"gauc": auc - 0.1} if gauc else {})}

    return {
        "name": kind.lower(),
        "over_arch": {"kind": kind, "num_parameters": 1000, "flops_per_sample": 2000},
        "dataset": {"name": "log", "dataset_id": "x"},
        "test": {"click": {**measures(sum(aucs) / len(aucs)), "logloss": 0.6}},
        "days": [{"day": day, "tasks": {"click": measures(auc)}} for day, auc in zip(days, aucs, strict=True)],
    }


def run(values: dict) -> Run:
    return Run(Report.model_validate(values), [])


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_the_table_of_one_run_has_a_line_per_day_and_the_mean():
    header, _, *lines = cells(days_table([run(report("SSR-S", [0.71, 0.72, 0.76]))]))
    assert header == ["next day", "AUC", "GAUC", "NE", "calibration"]
    assert lines[1] == ["2024-02-29", ".7200", ".6200", ".9000", "1.0200"]
    assert lines[3] == ["mean", ".7300", ".6300", ".9000", "1.0200"]
    assert len(lines) == 4


def test_two_runs_are_compared_on_the_days_both_have():
    first = run(report("SSR-S", [0.71, 0.72, 0.76]))
    second = run(report("Dense MLP", [0.73, 0.73], DAYS[1:], gauc=False))
    table = days_table([first, second])
    header, _, *lines = cells(table)
    assert header[1:4] == ["SSR-S AUC", "Dense MLP AUC", "SSR-S GAUC"] and "Dense MLP GAUC" not in header
    assert [line[0] for line in lines] == [*DAYS, "mean"]
    assert lines[0][1:3] == [".7100", "-"]
    # Differences -.01 and .03: mean .01, standard error .0283 / sqrt(2).
    assert "SSR-S is ahead of Dense MLP by AUC on 1 of 2 days, by .0100 +- .0200 (standard error" in table
    apart = days_table([first, run(report("Dense MLP", [0.7], ["2024-03-09"]))])
    assert "SSR-S and Dense MLP have 0 days in common." in apart


def test_a_run_without_the_task_stands_beside_one_that_has_it(tmp_path):
    values = report("Dense MLP", [0.73, 0.73, 0.74])
    other = {"test": {"like": values["test"]["click"]}}
    other["days"] = [{**day, "tasks": {"like": day["tasks"]["click"]}} for day in values["days"]]
    runs = [run(report("SSR-S", [0.71, 0.72, 0.76])), run({**values, **other})]
    header = cells(days_table(runs[:1]))[0]
    assert cells(days_table(runs))[0] == [header[0], *(f"SSR-S {name}" for name in header[1:])]
    draw_days(runs, tmp_path / "days.png")


def test_runs_are_compared_by_what_both_have():
    """An exact run of a number and a bounded one, which has no XAUC; and runs without any measure in common."""
    exact, bounded = report("SSR-S", [0.7, 0.7, 0.7]), report("Dense MLP", [0.7, 0.7, 0.7])
    for values, measures in ((exact, {"xauc": 0.6, "rmse": 4.0}), (bounded, {"rmse": 5.0})):
        values["test"] = {"click": measures}
        values["days"] = [{"day": day, "tasks": {"click": measures}} for day in DAYS]
    table = days_table([run(exact), run(bounded)])
    assert "SSR-S is ahead of Dense MLP by RMSE on 3 of 3 days, by 1.0000 +- .0000" in table
    assert "ahead" not in days_table([run(report("SSR-S", [0.7, 0.7, 0.7])), run(bounded)])


def test_days_that_are_numbers_are_in_their_order():
    one = run(report("SSR-S", [0.7, 0.7, 0.7], ["9", "10", "11"]))
    assert [line[0] for line in cells(days_table([one]))[2:]] == ["9", "10", "11", "mean"]


@pytest.mark.parametrize("runs", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_picture_has_ink_in_every_panel(tmp_path, runs):
    draw_days([run(report(f"kind {n}", [0.7 + n / 100, 0.72, 0.74])) for n in range(runs)], tmp_path / "days.png")
    picture = matplotlib.image.imread(tmp_path / "days.png")[:, :, :3]
    width = picture.shape[1] // 4
    for panel in range(4):
        colours = {tuple(pixel) for pixel in picture[:, panel * width : (panel + 1) * width].reshape(-1, 3).round(2)}
        assert len(colours) > 20


def test_show_runs_shows_days(tmp_path: Path, capsys):
    for kind, auc in (("A", 0.7), ("B", 0.6)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "report.json").write_text(json.dumps(report(kind, [auc, auc + 0.01, auc + 0.05])))
    assert main([str(tmp_path / "A"), str(tmp_path / "B"), "--plot", str(tmp_path / "days.png")]) == 0
    printed = capsys.readouterr().out
    assert "A is ahead of B by AUC on 3 of 3 days" in printed and "params" in printed
    assert (tmp_path / "days.png").stat().st_size > 10_000
