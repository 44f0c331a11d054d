"""Training by days: what is evaluated when, that nothing of a day is seen before, and jobs that go on from others."""

import math

import numpy as np
import pytest

from ssr_rec.runs.folder import read_metrics
from ssr_rec.training.datasets import choose_days, mean_of_days
from tests.days_log import DAYS, ROWS, options, write_days
from tests.jobs import refused_job, stopped_job, train_job
from tests.ranks import run_ranks

STEPS = [-(-rows // 64) for rows in ROWS.values()]


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    return write_days(tmp_path_factory.mktemp("days") / "data")


@pytest.fixture(scope="module")
def whole(days, tmp_path_factory):
    """Report and metrics.jsonl of an undisturbed run."""
    runs = tmp_path_factory.mktemp("whole")
    report = run_ranks(train_job, 1, options(days, runs, "--over_arch.fusion_dropout=0.1"))[0]
    return report, read_metrics(runs / "run" / "metrics.jsonl")


def shown(report: dict) -> list[tuple]:
    return [(row["day"], row["step"], row["tasks"]) for row in report["days"]]


def judged(report: dict) -> list[tuple]:
    return [(*line, row["deciles"]) for line, row in zip(shown(report), report["days"], strict=True)]


def test_every_next_day_is_evaluated_before_it_is_trained_on(whole):
    report, rows = whole
    assert [(row["day"], row["step"]) for row in report["days"]] == [
        (day, sum(STEPS[: number + 1])) for number, day in enumerate(DAYS[1:])
    ]
    assert report["steps"] == sum(STEPS) and report["dataset"]["num_rows"] == sum(ROWS.values())
    evaluations = [row for row in rows if row["split"] == "validation"]
    assert [(row["day"], row["step"], row["tasks"]) for row in evaluations] == shown(report)
    assert [row["split"] for row in rows].count("train") == sum(STEPS)
    assert "test" not in {row["split"] for row in rows}
    for task, measures in report["test"].items():
        for name in ("auc", "gauc", "logloss", "ne", "calibration"):
            assert measures[name] == pytest.approx(np.mean([row["tasks"][task][name] for row in report["days"]]))
    for row in report["days"]:
        assert set(row["deciles"]) == set(row["tasks"])
        for task, parts in row["deciles"].items():
            assert len(parts) == 10 and sum(part["rows"] for part in parts) == ROWS[row["day"]]
            clicks = {name: sum(part["rows"] * part[name] for part in parts) for name in ("predicted", "observed")}
            assert clicks["predicted"] / clicks["observed"] == pytest.approx(row["tasks"][task]["calibration"])
            assert np.all(np.diff([part["predicted"] for part in parts]) >= 0)
    best = max(report["days"], key=lambda row: row["tasks"]["click"]["auc"] + row["tasks"]["like"]["auc"])
    assert report["best_step"] == best["step"]


@pytest.mark.slow
def test_a_run_has_its_table_and_picture(days, tmp_path, capsys):
    report = train_job(options(days, tmp_path, "--data.days=2024-02-28..2024-03-01"))
    printed = capsys.readouterr().out
    assert [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| 2024")] == [
        *("2024-02-29", "2024-03-01") * 2
    ]
    assert f"mean of 2 next days, click: AUC {report['test']['click']['auc']:.4f}".replace("0.", ".") in printed
    assert (tmp_path / "run" / "days.png").stat().st_size > 10_000


def test_nothing_of_a_day_is_seen_before_its_evaluation(whole, tmp_path):
    """With other rows from the fourth day on, all figures before it are the same bits."""
    other = write_days(tmp_path / "other", redrawn={DAYS[3]: 7, DAYS[4]: 7})
    report = run_ranks(train_job, 1, options(other, tmp_path, "--over_arch.fusion_dropout=0.1"))[0]
    assert shown(report)[:2] == shown(whole[0])[:2]
    assert [row["tasks"] != theirs["tasks"] for row, theirs in zip(report["days"], whole[0]["days"], strict=True)] == [
        *(False, False, True, True)
    ]
    until = sum(STEPS[:3])
    losses = [
        [row["loss"] for row in rows if row["split"] == "train"]
        for rows in (read_metrics(tmp_path / "run" / "metrics.jsonl"), whole[1])
    ]
    assert losses[0][:until] == losses[1][:until] and losses[0][until] != losses[1][until]


@pytest.mark.slow
def test_days_that_fit_the_encodings_are_not_evaluated(days, whole, tmp_path):
    fitted = write_days(tmp_path / "fitted", fitted=3)
    report = run_ranks(train_job, 1, options(fitted, tmp_path, "--over_arch.fusion_dropout=0.1"))[0]
    assert shown(report) == shown(whole[0])[2:]


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param(sum(STEPS[:2]) + 2, id="within a day"),
        pytest.param(sum(STEPS[:3]), marks=pytest.mark.slow, id="between days"),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(days, whole, tmp_path, stop_at):
    mine = options(days, tmp_path, "--over_arch.fusion_dropout=0.1")
    assert run_ranks(stopped_job, 1, mine, stop_at) == ["preempted"]
    report = run_ranks(train_job, 1, mine)[0]
    assert shown(report) == shown(whole[0])
    assert [report[key] for key in ("test", "best_step", "steps", "epochs")] == [
        whole[0][key] for key in ("test", "best_step", "steps", "epochs")
    ]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in whole[1]]


@pytest.mark.slow
def test_passes_over_each_day_and_two_ranks(days, tmp_path):
    one, two = (
        run_ranks(train_job, ranks, options(days, tmp_path / str(ranks), "--train.epochs=2"))[0] for ranks in (1, 2)
    )
    assert [row["step"] for row in one["days"]] == [2 * sum(STEPS[: number + 1]) for number in range(4)]
    for mine, theirs in zip(one["days"], two["days"], strict=True):
        for task, measures in mine["tasks"].items():
            assert theirs["tasks"][task] == pytest.approx(measures, rel=1e-4)


OPTIMIZERS = {
    "rowwise_adagrad": ["--optimizer.warmup_steps=16"],
    "adam": ["--embeddings.optimizer=adam", "--embeddings.weight_decay=1e-3", "--embeddings.learning_rate=0.001"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_tomorrows_job_goes_on_where_todays_ended(days, tmp_path, kind):
    """Two jobs, the second on the later days with the first's weights and optimizer, are one job to the bit."""
    more = OPTIMIZERS[kind]
    whole = run_ranks(train_job, 1, options(days, tmp_path / "whole", *more))[0]
    run_ranks(train_job, 1, options(days, tmp_path / "today", "--data.days=..2024-02-29", *more))
    source = f"--warm_start={tmp_path / 'today' / 'run'}"
    later = options(days, tmp_path / "later", "--data.days=2024-03-01..", source, *more)
    report = run_ranks(train_job, 1, [*later, "--warm_start_optimizer=true"])[0]
    # The first evaluation is of the first day, with today's weights as they are.
    assert [(row["day"], row["tasks"]) for row in report["days"]] == [
        (row["day"], row["tasks"]) for row in whole["days"][1:]
    ]
    assert report["days"][0]["step"] == 0 and report["warm_start"]["optimizer"]["fresh"] == 0
    # And a third on the last day, after a resume of the second in its middle.
    parts = [*options(days, tmp_path / "parts", "--data.days=2024-03-01..2024-03-02", source, *more)]
    parts.append("--warm_start_optimizer=true")
    assert run_ranks(stopped_job, 1, parts, 3) == ["preempted"]
    run_ranks(train_job, 1, parts)
    last = options(days, tmp_path / "last", f"--warm_start={tmp_path / 'parts' / 'run'}", *more)
    last += ["--data.days=2024-03-03..", "--warm_start_optimizer=true"]
    assert run_ranks(train_job, 1, last)[0]["days"][0]["tasks"] == whole["days"][-1]["tasks"]
    if kind == "adam":  # weights alone end elsewhere: the test above would notice
        weights = [option.replace("/later", "/weights") for option in later]
        weights = [
            o.replace("/run", f"/run/checkpoints/step-{sum(STEPS[:2]):09d}") if "warm" in o else o for o in weights
        ]
        other = run_ranks(train_job, 1, weights)[0]
        assert other["days"][0]["tasks"] == whole["days"][1]["tasks"]
        assert other["days"][1]["tasks"] != whole["days"][2]["tasks"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--train.eval_every=10"],
            "train.eval_every=10: a day is evaluated once, when it is the next; set it to null",
        ),
        (["--train.patience=1"], "train.patience=1: a day is evaluated once"),
        (["--data.days=null"], "its splits are days; train on them in order with data.days: all"),
        (["--data.days=yesterday"], "data.days=yesterday: give all, FIRST..LAST, FIRST.. or ..LAST of 2024-02-28, "),
        (["--data.days=2024-03-01..2024-02-28"], "2024-03-01 comes after 2024-02-28"),
        (["--data.days=..2024-02-28"], "no next day to evaluate: the encodings are fitted on the first 1 of the days"),
        (["--warm_start_optimizer=true"], "warm_start_optimizer: true needs warm_start"),
        (["--train.batch_size=8"], "batch size 8 is the global one and must be at least 16"),
        (["--train.eval_batch_size=8"], "batch size 8 is the global one and must be at least 16"),
        (["--train.metrics_by=nothing"], "train.metrics_by: 'nothing' is no feature of this run"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(days, tmp_path, more, message):
    assert message in refused_job(options(days, tmp_path, *more))
    assert not (tmp_path / "run").exists()


def test_encodings_of_all_days_leave_none_to_evaluate_soon_enough(tmp_path):
    fitted = write_days(tmp_path / "fitted", fitted=3)
    for more in (["--data.days=..2024-03-01"], [f"--train.max_steps={sum(STEPS[:2])}"]):
        assert "fitted on the first 3" in refused_job(options(fitted, tmp_path, *more))


def test_a_day_with_fewer_rows_than_ranks_is_refused_at_once(tmp_path):
    few = write_days(tmp_path / "few", {**ROWS, DAYS[4]: 1})
    assert "split '2024-03-03' has 1 rows for a world size of 2" in run_ranks(refused_job, 2, options(few, tmp_path))[0]


def test_days_of_a_dataset_without(dataset, tmp_path):
    assert "is split into train, validation, test; prepare the log with --days" in refused_job(
        options(dataset, tmp_path)
    )


@pytest.mark.slow
def test_another_choice_of_days_is_another_run(days, tmp_path):
    run_ranks(stopped_job, 1, options(days, tmp_path), 4)
    refused = run_ranks(refused_job, 1, options(days, tmp_path, "--data.days=..2024-03-02"))[0]
    assert "that run had data.days=all, this one has ..2024-03-02" in refused
    assert (
        "in the middle of passes=1, this run has 2"
        in run_ranks(refused_job, 1, options(days, tmp_path, "--train.epochs=2"))[0]
    )


@pytest.mark.slow
def test_weights_alone_have_no_optimizer_to_take(days, tmp_path):
    run_ranks(train_job, 1, options(days, tmp_path / "a", "--checkpoint.every_minutes=null"))
    more = [f"--warm_start={tmp_path / 'a' / 'run'}", "--warm_start_optimizer=true"]
    assert "no training checkpoint (step-*)" in refused_job(options(days, tmp_path / "b", *more))
    best = next((tmp_path / "a" / "run" / "checkpoints").glob("best-*"))
    assert "weights alone; warm_start_optimizer needs a training checkpoint" in refused_job(
        options(days, tmp_path / "b", f"--warm_start={best}", more[1])
    )


def test_days_are_chosen_by_their_ends():
    names = ["1", "2", "10", "11"]
    assert choose_days("all", names) == names
    assert choose_days("2..10", names) == ["2", "10"]
    assert choose_days("..2", names) == ["1", "2"]
    assert choose_days("10..", names) == ["10", "11"]
    assert choose_days("..", names) == names
    assert choose_days("2..2", names) == ["2"]
    for wrong in ("3..", "2", "", "..12", "1...2"):
        with pytest.raises(ValueError, match=r"give all, FIRST\.\.LAST"):
            choose_days(wrong, names)


def test_the_mean_leaves_out_days_without_the_measure():
    rows = [{"tasks": {"a": {"auc": auc, "gauc": math.nan, "gauc_rows": 3}}} for auc in (0.5, math.nan, 0.75, None)]
    means = mean_of_days(rows)
    assert means["a"]["auc"] == 0.625 and math.isnan(means["a"]["gauc"]) and set(means["a"]) == {"auc", "gauc"}


def test_the_mean_of_exact_and_bounded_days_has_what_all_have_and_the_bounds():
    exact, bounded = {"auc": 0.5, "rmse": 2.0, "xauc": 0.6}, {"auc": 0.6, "auc_bound": 0.25, "rmse": 4.0}
    for days in ([exact, bounded], [bounded, exact]):
        means = mean_of_days([{"tasks": {"a": measures}} for measures in days])["a"]
        assert means == pytest.approx({"auc": 0.55, "auc_bound": 0.125, "rmse": 3.0})
