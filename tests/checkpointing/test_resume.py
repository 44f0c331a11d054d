"""A run that was interrupted goes on as if it had not been: bit for bit on as many ranks, to 1e-6 on others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ssr_rec.config.run import load_config
from ssr_rec.config.same_run import check_same_run
from ssr_rec.runs.folder import read_metrics
from tests.conftest import write_dataset
from tests.jobs import refused_job, refused_jobs, stopped_job, train_job
from tests.ranks import run_ranks

BASE = [
    "--over_arch.num_views=2",
    "--over_arch.view_dim=8",
    "--embeddings.dim=8",
    "--embeddings.learning_rate=0.02",
    "--train.batch_size=64",
    "--train.eval_batch_size=100",
    "--train.eval_every=10",
    "--train.epochs=3",
    "--train.log_every=1",
]
"""48 steps, 16 an epoch; interrupted at step 23, between evaluations and in the middle of an epoch."""
STOP_AT = 23


def options(dataset: Path, runs: Path, *more: str) -> list[str]:
    return [*BASE, f"--data.path={dataset}", f"--runs={runs}", "--name=run", *more]


def rows(runs: Path, split: str = "train") -> list[dict]:
    return [row for row in read_metrics(runs / "run" / "metrics.jsonl") if row["split"] == split]


def losses(runs: Path) -> np.ndarray:
    return np.array([row["loss"] for row in rows(runs)])


EXACT = {
    "rowwise_adagrad": ["--over_arch.fusion_dropout=0.2", "--optimizer.clip_norm=0.5"],
    "adam": ["--embeddings.optimizer=adam", "--embeddings.learning_rate=0.001", "--optimizer.warmup_steps=30"],
    "lazy_adam": ["--embeddings.optimizer=lazy_adam", "--optimizer.warmup_steps=30"],
    "ssr_d": ["--over_arch.filter=dynamic", "--embeddings.optimizer=adagrad"],
    "ssr_a": [
        *("--over_arch.filter=adaptive", "--over_arch.adapt_every=5", "--over_arch.adapt_until=40"),
        *("--over_arch.adapt_threshold=0", "--optimizer.ema_decay=0.9"),
    ],
    "batch_norm": ["--over_arch.input_norm=per_dim", "--embeddings.optimizer=sgd"],
}


@pytest.mark.parametrize("world_size", [2, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)]])
@pytest.mark.parametrize(
    "case", [case if case == "rowwise_adagrad" else pytest.param(case, marks=pytest.mark.slow) for case in EXACT]
)
def test_resuming_on_as_many_ranks_continues_bit_for_bit(dataset, tmp_path, case, world_size):
    if world_size > 2 and "adam" in case:
        pytest.skip("TorchRec's own DDP of replicated tables orders its buckets anew after the first step")
    more = EXACT[case]
    whole = run_ranks(train_job, world_size, options(dataset, tmp_path / "whole", *more))[0]
    assert case != "ssr_a" or whole["over_arch"]["filters"]["closed_fields"], "no dim has moved"
    parts = options(dataset, tmp_path / "parts", *more)
    assert run_ranks(stopped_job, world_size, parts, STOP_AT) == ["preempted"] * world_size
    assert len(losses(tmp_path / "parts")) == STOP_AT
    resumed = run_ranks(train_job, world_size, parts)[0]
    for split in ("train", "validation"):
        for mine, theirs in zip(rows(tmp_path / "parts", split), rows(tmp_path / "whole", split), strict=True):
            for key in ("step", "epoch", "samples", "loss", "tasks"):
                assert mine[key] == theirs[key], f"{split} row of step {theirs['step']}: {key}"
    for key in ("test", "validation", "best_step", "steps", "epochs"):
        assert resumed[key] == whole[key], key


@pytest.mark.faults
@pytest.mark.parametrize(
    "more",
    [
        ["--embeddings.optimizer=rowwise_adagrad"],
        ["--embeddings.optimizer=adam", "--embeddings.learning_rate=0.001"],
        ["--embeddings.optimizer=adagrad", "--embeddings.eps=1e-3"],
    ],
    ids=["rowwise_adagrad", "adam", "adagrad"],
)
def test_resuming_on_other_numbers_of_ranks(dataset, tmp_path, more):
    """Table-wise shards move, the optimizer's state with them; batches stay what they were."""
    for before, after in ((1, 2), (2, 1), (2, 4), (4, 1)):
        whole, stopped, runs = (tmp_path / f"{kind}{before}to{after}" for kind in ("whole", "stopped", "resumed"))
        if before == 2 and after == 4:
            whole, stopped = tmp_path / "whole2to1", tmp_path / "stopped2to1"
        else:
            run_ranks(train_job, before, options(dataset, whole, *more))
            run_ranks(stopped_job, before, options(dataset, stopped, *more), STOP_AT)
        shutil.copytree(stopped, runs)
        report = run_ranks(train_job, after, options(dataset, runs, *more))[0]
        assert report["world_size"] == after and report["steps"] == 48
        assert [row["samples"] for row in rows(runs)] == [row["samples"] for row in rows(whole)]
        assert np.abs(losses(runs) - losses(whole)).max() < 1e-6, f"{before} to {after}"


def test_every_row_of_an_epoch_is_read_once_across_the_interruption(dataset, tmp_path):
    """A sample read twice or left out would show as another loss; here the ids themselves are counted."""
    from tests.jobs import read_rows_job

    seen = run_ranks(read_rows_job, 2, options(dataset, tmp_path), str(dataset), 0, 7)
    seen += run_ranks(read_rows_job, 3, options(dataset, tmp_path), str(dataset), 7, None)
    everything = run_ranks(read_rows_job, 1, options(dataset, tmp_path), str(dataset), 0, None)
    assert sorted(row for part in seen for row in part) == sorted(everything[0])


@pytest.mark.slow
def test_losing_the_optimizer_state_would_be_noticed(dataset, tmp_path):
    """Guards the tests above: the same resume from weights alone ends elsewhere."""
    run_ranks(stopped_job, 1, options(dataset, tmp_path, "--checkpoint.keep=1"), STOP_AT)
    source = tmp_path / "run" / "checkpoints" / f"step-{STOP_AT:09d}"
    run_ranks(train_job, 1, options(dataset, tmp_path / "whole"))
    run_ranks(train_job, 1, options(dataset, tmp_path / "warm", f"--warm_start={source}"))
    assert abs(losses(tmp_path / "warm")[0] - losses(tmp_path / "whole")[STOP_AT]) > 1e-4


@pytest.mark.slow
def test_resume_names_a_run_or_a_checkpoint(dataset, tmp_path):
    """The new run has a folder of its own, and the best weights so far in it."""
    run_ranks(train_job, 1, options(dataset, tmp_path / "whole", "--train.epochs=4"))
    run_ranks(train_job, 1, options(dataset, tmp_path / "first"))
    for name, source in (("a", "first/run"), ("b", f"first/run/checkpoints/step-{48:09d}")):
        more = ["--train.epochs=4", f"--resume={tmp_path / source}"]
        report = run_ranks(train_job, 2, options(dataset, tmp_path / name, *more))[0]
        assert np.abs(losses(tmp_path / name) - losses(tmp_path / "whole")[48:]).max() < 1e-6
        assert report["steps"] == 64
        assert [row["step"] for row in rows(tmp_path / name, "validation")] == [50, 60, 64], "48 has been evaluated"
        assert (tmp_path / name / "run" / "checkpoints" / f"best-{report['best_step']:09d}").is_dir()


def test_what_is_not_the_same_run_is_refused(dataset, tmp_path):
    run_ranks(stopped_job, 1, options(dataset, tmp_path), STOP_AT)
    other = write_dataset(tmp_path / "other", {"train": 500, "validation": 90, "test": 90}, rows_in_group=64, seed=1)
    refused = {
        "had optimizer.learning_rate=0.001, this one has 0.1": options(
            dataset, tmp_path, "--optimizer.learning_rate=0.1"
        ),
        "had train.task_weights={}, this one has {'click': 2.0}": options(
            dataset, tmp_path, "--train.task_weights={click: 2.0}"
        ),
        "had train.batch_size=64, this one has 128": options(dataset, tmp_path, "--train.batch_size=128"),
        "had over_arch.num_views=2, this one has 3": options(dataset, tmp_path, "--over_arch.num_views=3"),
        "dataset_id=tiny-0, this run has tiny-1": options(other, tmp_path),
        "not empty": options(dataset, tmp_path, "--resume=never"),
        "no checkpoint and no run folder with one": options(
            dataset, tmp_path / "new", f"--resume={tmp_path / 'nowhere'}"
        ),
        "had data.num_lanes=16, this one has 8": options(dataset, tmp_path, "--data.num_lanes=8"),
    }
    for found in run_ranks(refused_jobs, 2, list(refused.values())):
        for message, said in zip(refused, found, strict=True):
            assert message in said
    # None of these has touched the run.
    assert run_ranks(train_job, 1, options(dataset, tmp_path))[0]["steps"] == 48


@pytest.mark.slow
def test_more_ranks_than_lanes_would_mean_other_rows(dataset, tmp_path):
    more = ["--data.num_lanes=1", "--train.eval_every=null"]
    run_ranks(stopped_job, 1, options(dataset, tmp_path, *more), STOP_AT)
    assert "num_lanes=1, this run has 2" in run_ranks(refused_job, 2, options(dataset, tmp_path, *more))[0]


@pytest.mark.slow
def test_stopping_between_a_step_and_its_evaluation_loses_no_evaluation(dataset, tmp_path):
    run_ranks(train_job, 1, options(dataset, tmp_path / "whole"))
    run_ranks(stopped_job, 1, options(dataset, tmp_path / "parts"), 20)
    run_ranks(train_job, 1, options(dataset, tmp_path / "parts"))
    assert [(r["step"], r["tasks"]) for r in rows(tmp_path / "parts", "validation")] == [
        (r["step"], r["tasks"]) for r in rows(tmp_path / "whole", "validation")
    ]


@pytest.mark.slow
def test_early_stopping_counts_on(dataset, tmp_path):
    more = ["--embeddings.learning_rate=1.0", "--train.patience=3", "--train.eval_every=5", "--train.epochs=30"]
    whole = run_ranks(train_job, 1, options(dataset, tmp_path / "whole", *more))[0]
    assert whole["stopped_early"] and whole["best_step"] == whole["steps"] - 15
    run_ranks(stopped_job, 1, options(dataset, tmp_path / "parts", *more), whole["steps"] - 7)
    resumed = run_ranks(train_job, 1, options(dataset, tmp_path / "parts", *more))[0]
    for key in ("steps", "best_step", "stopped_early", "test"):
        assert resumed[key] == whole[key]


@pytest.mark.slow
def test_keeps_the_last_and_the_best(dataset, tmp_path):
    more = ["--checkpoint.every_steps=6", "--checkpoint.keep=3", "--embeddings.learning_rate=1.0"]
    report = run_ranks(train_job, 2, options(dataset, tmp_path, *more))[0]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    kept = [json.loads((tmp_path / "run" / "checkpoints" / n / "checkpoint.json").read_text()) for n in names]
    assert [info["step"] for info in kept if info["kind"] == "training"] == [36, 42, 48]
    bests = {info["step"] for info in kept if info["kind"] == "weights"}
    named = {info["fitted"]["best"]["step"] for info in kept if info["kind"] == "training"}
    assert bests == named | {report["best_step"]}


@pytest.mark.slow
def test_checkpoints_can_be_off(dataset, tmp_path):
    report = run_ranks(train_job, 1, options(dataset, tmp_path, "--checkpoint.every_minutes=null"))[0]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"best-{report['best_step']:09d}"]


@pytest.mark.slow
def test_saving_in_the_background_or_not_gives_equal_files(dataset, tmp_path):
    """A copy that is not one would hold weights of later steps."""
    stored = {}
    for flag in ("true", "false"):
        more = [f"--checkpoint.asynchronous={flag}", "--checkpoint.every_steps=5", "--checkpoint.keep=20"]
        run_ranks(train_job, 2, options(dataset, tmp_path / flag, *more))
        folder = tmp_path / flag / "run" / "checkpoints"
        infos = {p.name: json.loads((p / "checkpoint.json").read_text()) for p in folder.iterdir()}
        stored[flag] = {
            (name, file): sums
            for name, info in infos.items()
            for file, sums in info["files"].items()
            if "distcp" in file
        }
    assert stored["true"] == stored["false"] and len(stored["true"]) > 20


@pytest.mark.slow
def test_an_autofis_search_goes_on_and_is_not_repeated(dataset, tmp_path):
    over_arch = "--over_arch={name: autofis, hidden: [8]}"
    more = [o for o in options(dataset, tmp_path) if "view" not in o] + [over_arch]
    assert run_ranks(stopped_job, 2, more, STOP_AT) == ["preempted"] * 2
    assert run_ranks(stopped_job, 2, more, STOP_AT + 1) == ["preempted"] * 2
    assert (tmp_path / "run-search" / "report.json").exists() and not (tmp_path / "run" / "report.json").exists()
    searched = (tmp_path / "run-search" / "metrics.jsonl").read_text()
    assert run_ranks(train_job, 2, more)[0]["steps"] == 48
    assert (tmp_path / "run-search" / "metrics.jsonl").read_text() == searched


def test_a_run_goes_on_measured_by_the_column_it_began_with():
    """The best evaluation so far, which the report shows, has the values of that column."""
    config = load_config(None, ["--train.metrics_by=tab"]).model_dump(mode="json")
    check_same_run(config, config, "older")
    with pytest.raises(ValueError, match=r"older: that run had train\.metrics_by=None, this one has tab"):
        check_same_run(config, load_config(None, []).model_dump(mode="json"), "older")


def test_a_run_from_before_a_key_was_there_goes_on_where_it_has_its_default():
    config = load_config(None, []).model_dump(mode="json")
    older = {**config, "embeddings": {key: value for key, value in config["embeddings"].items() if key != "managed"}}
    check_same_run(config, older, "older")
    config["embeddings"]["managed"] = {"user": {"rows": 5}}
    with pytest.raises(ValueError, match=r"older: that run had embeddings\.managed\.user\.rows=None, this one has 5"):
        check_same_run(config, older, "older")
