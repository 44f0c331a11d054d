"""The table and the sentence that compare runs."""

import pytest

from ssr_rec.runs.report import Report, Run
from ssr_rec.runs.table import best_first, display_names, markdown_table, runs_table, summary


def run(name: str, auc: float | None, *, tasks=("click",), ceiling=None, kind=None, dataset="x", **measures) -> Run:
    report = {
        "name": name,
        "over_arch": {"kind": kind or name, "num_parameters": 1_234_567, "flops_per_sample": 2_400_000},
        "test": {task: {"auc": auc, **measures} for task in tasks},
        "ceiling": {task: {"auc": ceiling, "logloss": 0.44} for task in tasks} if ceiling else {},
        "samples_per_s": 24_100.0,
        "dataset": {"name": "synthetic", "dataset_id": dataset},
    }
    return Run(Report.model_validate(report), [])


def test_the_table_is_aligned_with_the_ceiling_on_top_and_the_best_first():
    runs = [
        run("Dense MLP 3x320", 0.7166, ceiling=0.7614, gauc=0.69, logloss=0.46),
        run("SSR-S 8x128x2", 0.7269, ceiling=0.7614, gauc=None, logloss=0.457),
    ]
    assert runs_table(runs).splitlines() == [
        "| over-arch       | params | FLOPs/sample | click AUC | click GAUC | click logloss | samples/s |",
        "| --------------- | -----: | -----------: | --------: | ---------: | ------------: | --------: |",
        "| ceiling         |      - |            - |     .7614 |          - |         .4400 |         - |",
        "| SSR-S 8x128x2   |  1.23M |        2.40M |     .7269 |          - |         .4570 |     24.1k |",
        "| Dense MLP 3x320 |  1.23M |        2.40M |     .7166 |      .6900 |         .4600 |     24.1k |",
    ]


def test_without_groups_or_a_ceiling_there_is_no_column_or_row_for_them():
    table = runs_table([run("a", 0.7)])
    assert "GAUC" not in table and "ceiling" not in table and len(table.splitlines()) == 3


def test_a_bar_in_a_label_does_not_end_the_cell():
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines()[2] == "| x\\|y |   1 |"


def test_runs_with_one_label_are_told_apart_by_name():
    assert display_names([run("one", 0.7, kind="MLP"), run("two", 0.7, kind="MLP"), run("x", 0.7, kind="SSR-S")]) == [
        "MLP (one)",
        "MLP (two)",
        "SSR-S",
    ]


def test_the_sentence():
    ssr, mlp, fm = (run(name, auc, ceiling=0.7614) for name, auc in (("SSR-S", 0.7269), ("MLP", 0.7166), ("FM", 0.72)))
    assert summary([mlp]) == "MLP reaches .7166 click AUC; that is 82.9 % of the way from .5 to the ceiling of .7614."
    assert summary([mlp, ssr]) == (
        "SSR-S reaches .7269 click AUC, +.0103 over MLP; that is 86.8 % of the way from .5 to the ceiling of .7614."
    )
    assert summary([mlp, ssr, fm]).startswith(
        "SSR-S reaches .7269 click AUC, +.0069 over the next, FM, and +.0103 over the last, MLP; that is 86.8 %"
    )


def test_the_sentence_without_a_ceiling_and_with_runs_that_have_no_auc():
    assert summary([run("a", 0.7), run("b", None)]) == "a reaches .7000 click AUC."
    assert summary([run("b", None)]) == "No run has a test AUC for click."
    two = summary([run("a", 0.7, tasks=("click", "like"))])
    assert two == "a reaches .7000 click AUC.\na reaches .7000 like AUC."


def test_order_and_what_cannot_be_compared():
    ranked = best_first([run("a", None), run("b", 0.6), run("c", 0.7)])
    assert [one.report.name for one in ranked] == ["c", "b", "a"]
    with pytest.raises(ValueError, match=r"run a is on dataset synthetic \(x\), run b on synthetic \(y\)"):
        best_first([run("a", 0.7), run("b", 0.7, dataset="y")])
    with pytest.raises(ValueError, match="no runs to compare"):
        best_first([])


def test_runs_of_a_number_are_ranked_by_xauc_or_else_by_their_error():
    def of(name: str, **measures: float) -> Run:
        report = run(name, None).report.model_copy(update={"test": {"watch_s": measures}})
        return Run(report, [])

    exact = [of("a", rmse=3.0, xauc=0.6, calibration=0.9), of("b", rmse=4.0, xauc=0.7, calibration=1.1)]
    assert display_names(best_first(exact)) == ["b", "a"]
    assert "| watch_s XAUC | watch_s RMSE | watch_s calibration |" in runs_table(exact)
    assert summary(exact) == "b reaches .7000 watch_s XAUC, +.1000 over a."
    bounded = [of("b", rmse=4.0), of("a", rmse=3.0), of("c", rmse=9.5, mine=1.0)]
    assert display_names(best_first(bounded)) == ["a", "b", "c"]
    assert summary(bounded) == "a reaches 3.0000 watch_s RMSE, -1.0000 over the next, b, and -6.5000 over the last, c."
    assert "| watch_s RMSE | watch_s mine |" in runs_table(bounded)
    other = [of("a", rmse=3.0), run("b", 0.7)]
    assert display_names(best_first(other)) == ["a", "b"] and "watch_s RMSE" in runs_table(other)
