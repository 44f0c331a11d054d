"""The whole job on real ranks: equal losses for every world size, a run folder, refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_rec import train as train_script
from ssr_rec.config.run import load_config
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.schema import Schema
from ssr_rec.runs.folder import read_metrics
from ssr_rec.training.setup import check_train_config
from tests.conftest import write_dataset
from tests.jobs import initial_digests_job, plain_loss_job, refused_job, refused_jobs, train_job
from tests.ranks import run_ranks

SMALL = [
    "--over_arch.num_views=2",
    "--over_arch.view_dim=8",
    "--embeddings.dim=8",
    "--train.batch_size=64",
    "--train.eval_batch_size=100",
    "--embeddings.learning_rate=0.05",
    "--embeddings.init_scale=0.05",
    "--train.log_every=1",
]


def overrides(dataset: Path, runs: Path, *more: str) -> list[str]:
    return [*SMALL, f"--data.path={dataset}", f"--runs={runs}", "--name=run", *more]


def losses(runs: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(runs / "run" / "metrics.jsonl") if row["split"] == "train"])


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        pytest.param("rowwise_adagrad", ["--embeddings.dims={user: 12, tags: 4}"], marks=pytest.mark.slow),
        # Element-wise Adagrad divides a first gradient by itself: with eps near 0 rounding alone decides its sign.
        pytest.param(
            "adagrad",
            ["--embeddings.eps=1e-3", "--over_arch.name=mlp", "--over_arch.hidden=[16, 8]"],
            marks=pytest.mark.slow,
        ),
        pytest.param("adam", ["--embeddings.learning_rate=0.001"], marks=pytest.mark.slow),
        pytest.param(
            "lazy_adam",
            ["--embeddings.learning_rate=0.01", "--embeddings.weight_decay=0.1", "--sharding.types=[column_wise]"],
            marks=pytest.mark.slow,
        ),
        # The only one that notices a gradient of the wrong scale.
        ("sgd", ["--embeddings.learning_rate=3.0"]),
    ],
)
def test_world_size_does_not_change_the_losses(dataset, tmp_path, optimizer, more):
    more = [f"--embeddings.optimizer={optimizer}", "--train.epochs=4", *more]
    reports = {}
    others = (2,) if optimizer == "sgd" else (2, 4)
    for world_size in (1, *others):
        options = overrides(dataset, tmp_path / str(world_size), *more)
        options = [o for o in options if "mlp" not in " ".join(more) or "view" not in o]
        reports[world_size] = run_ranks(train_job, world_size, options)[0]
    alone = losses(tmp_path / "1")
    assert len(alone) == 64 and alone[-8:].mean() < alone[:8].mean() - 0.01, "the model must have learnt something"
    for world_size in others:
        assert np.abs(losses(tmp_path / str(world_size)) - alone)[:50].max() < 1e-5
        for task in ("click", "like"):
            for metric in ("auc", "gauc", "logloss"):
                mine, theirs = (reports[w]["test"][task][metric] for w in (1, world_size))
                assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_world_size_does_not_change_the_losses_of_ssr_d(dataset, tmp_path):
    """ICS's thresholds amplify rounding from step to step (docs/architecture.md), hence fewer steps."""
    for world_size in (1, 2):
        options = ["--over_arch.filter=dynamic", "--train.max_steps=8"]
        run_ranks(train_job, world_size, overrides(dataset, tmp_path / str(world_size), *options))
    assert np.abs(losses(tmp_path / "1") - losses(tmp_path / "2")).max() < 1e-5


def test_first_loss_equals_a_plain_computation(dataset, tmp_path):
    """Without training, the reported loss is what plain indexing, torch layers and pandas give."""
    options = overrides(dataset, tmp_path, "--train.max_steps=1", "--data.shuffle=false", "--data.num_lanes=1")
    options += ["--train.task_weights={like: 3}", "--embeddings.pooling=sum"]
    (logged,) = run_ranks(plain_loss_job, 1, options, str(dataset))
    run_ranks(train_job, 1, options)
    assert losses(tmp_path)[0] == pytest.approx(logged, abs=1e-6)


def test_initial_weights_do_not_depend_on_the_world_size(dataset):
    alone = run_ranks(initial_digests_job, 1, SMALL, str(dataset))[0]
    assert run_ranks(initial_digests_job, 2, [*SMALL, "--sharding.types=[column_wise]"], str(dataset))[0] == alone
    assert run_ranks(initial_digests_job, 3, SMALL, str(dataset))[2] == alone
    assert run_ranks(initial_digests_job, 1, [*SMALL, "--seed=1"], str(dataset))[0] != alone


def test_run_folder_holds_what_the_contract_says(dataset, tmp_path):
    more = ["--train.eval_every=10", "--train.epochs=2", "--over_arch.filter=dynamic"]
    report = run_ranks(train_job, 2, overrides(dataset, tmp_path, *more), None, True)[0]
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    pictures = {"curves.png", "filters.png"}  # the second of filters that zero dims alone
    assert names == {"config.yaml", "metrics.jsonl", "report.json", "tensorboard", "checkpoints"} | pictures
    assert load_config(folder / "config.yaml") == load_config(None, overrides(dataset, tmp_path, *more))
    written = json.loads((folder / "report.json").read_text())
    assert written["test"] == json.loads(json.dumps(report["test"])) and written["world_size"] == 2
    assert written["steps"] == 32 and written["epochs"] == 2.0
    assert len(written["over_arch"]["filters"]["layers"]) == 2
    rows = read_metrics(folder / "metrics.jsonl")
    validations = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in validations] == [10, 20, 30, 32]
    best = max(validations, key=lambda row: row["tasks"]["click"]["auc"] + row["tasks"]["like"]["auc"])
    assert written["best_step"] == best["step"] and written["validation"] == best["tasks"]
    assert rows[-1]["split"] == "test" and rows[-1]["tasks"] == written["test"]


@pytest.mark.slow
def test_best_model_is_restored_for_the_test(dataset, tmp_path):
    """With validation == test, the final test must repeat the best evaluation, not the last one."""
    schema = json.loads((dataset / "schema.json").read_text())
    schema["splits"]["test"] = schema["splits"]["validation"]
    del schema["checksum"]
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / split).symlink_to(dataset / split)
    (folder / "schema.json").write_text(json.dumps(schema))
    # A rate this high overfits at once, so that the best evaluation is not the last.
    options = ["--train.epochs=30", "--embeddings.learning_rate=1.0", "--train.patience=3", "--train.eval_every=8"]
    report = run_ranks(train_job, 2, overrides(folder, tmp_path, *options))[0]
    assert report["stopped_early"] and report["best_step"] == report["steps"] - 24
    assert report["test"] == report["validation"]


@pytest.mark.slow
def test_same_seed_repeats_exactly(dataset, tmp_path):
    options = ["--train.max_steps=10", "--over_arch.fusion_dropout=0.2"]
    for name in ("a", "b"):
        run_ranks(train_job, 2, overrides(dataset, tmp_path / name, *options))
    assert np.array_equal(losses(tmp_path / "a"), losses(tmp_path / "b"))


def test_warmup_scales_both_learning_rates(dataset, tmp_path):
    run_ranks(train_job, 1, overrides(dataset, tmp_path, "--train.max_steps=6", "--optimizer.warmup_steps=4"))
    rates = [row["lr"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.001])


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(dataset, tmp_path):
    for flag in ("false", "true"):
        run_ranks(train_job, 1, overrides(dataset, tmp_path / flag, "--train.max_steps=12", f"--train.bf16={flag}"))
    gap = np.abs(losses(tmp_path / "true") - losses(tmp_path / "false"))
    assert 0 < gap[0] < 1e-3 and gap.max() < 0.1


REFUSED = {
    "--data.path=nowhere": "nowhere/schema.json: no such file",
    "--data.labels=[buy]": "label 'buy' is not in dataset 'tiny'; it has click, like",
    "--data.features=[user, itme]": "feature 'itme' is not in dataset 'tiny'",
    "--embeddings.dims={usr: 8}": "embeddings.dims names 'usr'",
    "--embeddings.dim=6": "embeddings.dim=6 must be a multiple of 4",
    "--train.task_weights={buy: 1}": "train.task_weights names 'buy'",
    "--train.monitor_task=buy": "train.monitor_task names 'buy'",
    "--train.batch_size=8": "batch size 8 is the global one and must be at least 16",
    "--sharding.types=[row_wise]": "'row_wise' is not supported on cpu; use table_wise, column_wise",
    "--sharding.types=[table_wise] --embeddings.optimizer=adam": "adam keeps every table on every rank",
    "--sharding.memory_gib=1e-6": "no sharding plan for 5 tables on 2 cpu ranks",
    "--over_arch.view_dim=500": "500",
    "--device=cuda": "no GPU here",
}


def test_what_cannot_work_is_refused_before_a_run_folder_exists(dataset, tmp_path):
    options = [option for option in REFUSED if option != "--device=cuda" or not torch.cuda.is_available()]
    jobs = [overrides(dataset, tmp_path / "runs", *re.split(" (?=--)", option)) for option in options]
    for messages in run_ranks(refused_jobs, 2, jobs):
        for option, message in zip(options, messages, strict=True):
            assert REFUSED[option] in message, option
    assert not (tmp_path / "runs").exists()


def test_a_negative_task_weight_and_nothing_but_zeros_are_refused(dataset):
    with pytest.raises(ValueError, match=r"train.task_weights.like"):
        load_config(None, ["--train.task_weights={like: -1}"])
    schema = Schema.read(dataset)
    check_train_config(TrainConfig(task_weights={"like": 0}), schema)
    with pytest.raises(ValueError, match="gives every label of click, like 0"):
        check_train_config(TrainConfig(task_weights={"like": 0, "click": 0}), schema)


def test_run_folder_in_use_is_refused(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text("{}")
    for refused in run_ranks(refused_job, 2, overrides(dataset, tmp_path)):
        assert "not empty" in refused


def test_more_ranks_than_training_rows_are_refused(tmp_path):
    folder = write_dataset(tmp_path / "d", {"train": 3, "validation": 3, "test": 3}, rows_in_group=32)
    assert "3 rows for a world size of 4" in run_ranks(refused_job, 4, overrides(folder, tmp_path))[0]


def test_exploding_loss_ends_the_run(dataset, tmp_path):
    options = ["--optimizer.learning_rate=1e30", "--over_arch.name=mlp", "--train.epochs=3"]
    options = [o for o in overrides(dataset, tmp_path, *options) if "view" not in o]
    refused = run_ranks(refused_job, 2, options)
    assert any("loss is" in message and "learning_rate" in message for message in refused)


def test_script_ends_with_one_line_and_exit_code_2(capsys):
    assert train_script.main(["--train.batchsize=3"]) == 2
    assert capsys.readouterr().err == "error: config: unknown key 'train.batchsize'; did you mean 'batch_size'?\n"


def test_print_config_shows_the_resolved_run(capsys, tmp_path):
    assert train_script.main(["--print_config", "--optimizer.learning_rate=3e-4"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "c.yaml").optimizer.learning_rate == 3e-4
