"""fp16 tables and fp16 communication: what is halved, what is rounded, and what stays exact."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_rec.data.reader import Reader
from ssr_rec.serving.trained_model import restore_model
from tests.checkpointing.test_resume import STOP_AT, losses, options
from tests.jobs import refused_job, stopped_job, train_job, warm_started_job
from tests.ranks import run_ranks
from tests.scale_jobs import exchange_job, table_bytes_job

FP16 = "--embeddings.dtype=fp16"


def test_half_precision_halves_the_tables(dataset, tmp_path):
    whole = run_ranks(table_bytes_job, 2, options(dataset, tmp_path), str(dataset))
    halves = run_ranks(
        table_bytes_job, 2, options(dataset, tmp_path, FP16, "--embeddings.dtypes={item: fp32}"), str(dataset)
    )
    for name in ("user", "history", "item", "price", "tags"):
        before, after = (sum(rank[name][1] for rank in ranks) for ranks in (whole, halves))
        assert whole[0][name][0] == "torch.float32" and before > 0
        assert halves[0][name][0] == ("torch.float32" if name == "item" else "torch.float16")
        assert after == (before if name == "item" else before // 2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_half_precision_tables_learn_like_whole_ones(dataset, tmp_path, optimizer):
    more = [f"--embeddings.optimizer={optimizer}", "--embeddings.eps=1e-3"]
    more += ["--embeddings.learning_rate=3.0"] if optimizer == "sgd" else []
    for name, dtype in (("fp32", []), ("fp16", [FP16])):
        run_ranks(train_job, 1, options(dataset, tmp_path / name, *more, *dtype))
    whole, halves = losses(tmp_path / "fp32"), losses(tmp_path / "fp16")
    assert halves[-8:].mean() < halves[:8].mean() - 0.01, "the model must have learnt something"
    assert 0 < np.abs(whole - halves)[0] < 1e-4 and np.abs(whole - halves).max() < 0.01


@pytest.mark.slow
def test_resuming_keeps_the_precision_bit_for_bit(dataset, tmp_path):
    more = [FP16, "--embeddings.dtypes={item: fp32}"]
    run_ranks(train_job, 2, options(dataset, tmp_path / "whole", *more))
    parts = options(dataset, tmp_path / "parts", *more)
    assert run_ranks(stopped_job, 2, parts, STOP_AT) == ["preempted"] * 2
    run_ranks(train_job, 2, parts)
    assert np.array_equal(losses(tmp_path / "parts"), losses(tmp_path / "whole"))


@pytest.mark.slow
def test_a_restored_model_scores_as_the_run_did(dataset, tmp_path):
    """Unsharded, with PyTorch's own kernels, and lists that add up several ids."""
    more = [FP16, "--train.max_steps=16", "--embeddings.init_scale=1.0"]
    report = run_ranks(train_job, 2, options(dataset, tmp_path, *more))[0]
    run = restore_model(tmp_path / "run")
    reader = Reader(Path(dataset), run.schema, "test", batch_size=1_000)
    (batch,) = reader.epoch(0)
    with torch.no_grad():
        logits = run.model(batch.sparse)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").mean(0)
    assert loss.tolist() == pytest.approx([report["test"][task]["logloss"] for task in ("click", "like")], abs=1e-6)


@pytest.mark.slow
def test_resuming_with_other_precisions_is_refused(dataset, tmp_path):
    run_ranks(stopped_job, 1, options(dataset, tmp_path), STOP_AT)
    for more, key in (
        (FP16, "embeddings.dtype=fp32"),
        ("--sharding.qcomms={forward: fp16}", "sharding.qcomms.forward=fp32"),
    ):
        assert f"that run had {key}" in run_ranks(refused_job, 1, options(dataset, tmp_path, more))[0]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_warm_start_rounds_to_this_runs_precision(dataset, tmp_path, world_size):
    short = ["--train.max_steps=6", "--train.eval_every=3"]
    run_ranks(train_job, 2, options(dataset, tmp_path, *short))
    _, whole = run_ranks(warm_started_job, 1, options(dataset, tmp_path), str(dataset), str(tmp_path / "run"))[0]
    halves = options(dataset, tmp_path, FP16)
    report, found = run_ranks(warm_started_job, world_size, halves, str(dataset), str(tmp_path / "run"))[0]
    assert {name.split(".")[-2]: dtype for name, dtype in report["other_dtype"].items()} == dict.fromkeys(
        whole, "torch.float32"
    )
    for name, table in whole.items():
        # whole_tables adds the shards of fp16 up in fp32.
        assert np.array_equal(found[name], table.astype(np.float16).astype(found[name].dtype)), name
    # And back: a table of halves begins a run in fp32 with exactly their values.
    run_ranks(train_job, 2, options(dataset, tmp_path / "halves", FP16, *short))
    source = str(tmp_path / "halves" / "run")
    _, halves_now = run_ranks(warm_started_job, 1, options(dataset, tmp_path, FP16), str(dataset), source)[0]
    _, wide = run_ranks(warm_started_job, world_size, options(dataset, tmp_path), str(dataset), source)[0]
    assert all(np.array_equal(wide[name], halves_now[name].astype(np.float32)) for name in wide)


@pytest.mark.slow
def test_warm_start_refuses_what_half_precision_cannot_hold(dataset, tmp_path):
    more = [
        "--embeddings.init_scale=200000.0",
        "--train.max_steps=1",
        "--train.max_loss=null",
        "--over_arch.input_norm=per_dim",
    ]
    run_ranks(train_job, 1, options(dataset, tmp_path, *more))
    arguments = options(dataset, tmp_path / "halves", FP16, f"--warm_start={tmp_path / 'run'}")
    for message in run_ranks(refused_job, 2, arguments):
        assert "beyond the range of torch.float16; keep it in fp32 by embeddings.dtypes" in message


@pytest.mark.parametrize("optimizer", ["adam", "lazy_adam"])
def test_half_precision_with_adam_on_cpu_is_refused(dataset, tmp_path, optimizer):
    more = [f"--embeddings.optimizer={optimizer}", "--embeddings.dtypes={item: fp16}"]
    refused = run_ranks(refused_job, 1, options(dataset, tmp_path, *more))
    assert f"embeddings.dtype: 'item' is fp16, but {optimizer} here" in refused[0]
    assert "or embeddings.optimizer rowwise" in refused[0]


def test_half_precision_communication_halves_the_bytes_and_rounds_to_nearest(dataset, tmp_path):
    sgd = ["--embeddings.optimizer=sgd", "--embeddings.learning_rate=1.0", "--embeddings.init_scale=0.0001"]
    found = {}
    for name, forward, backward in (("plain", "fp32", "fp32"), ("forward", "fp16", "fp32"), ("both", "fp16", "fp16")):
        qcomms = f"--sharding.qcomms={{forward: {forward}, backward: {backward}}}"
        found[name] = run_ranks(exchange_job, 2, options(dataset, tmp_path, *sgd, qcomms), str(dataset))
    for rank in range(2):
        plain, forward, both = (found[name][rank] for name in ("plain", "forward", "both"))
        rounded = plain["pooled"].astype(np.float16).astype(np.float32)
        assert np.array_equal(forward["pooled"], rounded) and np.array_equal(both["pooled"], rounded)
        assert not np.array_equal(plain["pooled"], rounded)
        sizes = [[size for _, size in run["wire"]] for run in (plain, forward, both)]
        assert len(sizes[0]) == 2 and min(sizes[0]) > 0, "one exchange forward, one backward"
        assert sizes[1] == [sizes[0][0] // 2, sizes[0][1]] and sizes[2] == [size // 2 for size in sizes[0]]
    for name, moved in found["plain"][0]["moved"].items():
        assert np.array_equal(found["forward"][0]["moved"][name], moved), "gradients travelled in fp32"
        gap = np.abs(found["both"][0]["moved"][name] - moved)
        # Each rank's gradients are rounded to 11 bits, however small; the tables' own rounding is far less.
        assert gap.max() > 0 and (gap <= np.abs(moved) * 2**-10 + 2**-36).all(), name


@pytest.mark.slow
def test_training_with_half_precision_communication_stays_close(dataset, tmp_path):
    for name, more in (("fp32", []), ("fp16", ["--sharding.qcomms={forward: fp16, backward: fp16}"])):
        run_ranks(train_job, 2, options(dataset, tmp_path / name, *more))
    gap = np.abs(losses(tmp_path / "fp32") - losses(tmp_path / "fp16"))
    assert 0 < gap[:10].max() < 2e-3 and gap.max() < 0.02


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--train.tf32=true",
            "train.tf32: only NVIDIA GPUs from A100 (compute capability 8.0) on have TF32; remove it",
        ),
        ("--train.pipeline=prefetch", "train.pipeline: prefetch needs CUDA streams"),
        ("--sharding.kernels=[fused_uvm_caching]", "sharding.kernels: 'fused_uvm_caching' is not supported on cpu"),
        (
            "--sharding.qcomms={forward: bf16}",
            "sharding.qcomms.forward: bf16 is not supported by gloo on CPU; use fp16",
        ),
        ("--embeddings.dtypes={itm: fp16}", "embeddings.dtypes names 'itm'"),
    ],
)
def test_what_this_device_cannot_do_is_refused(dataset, tmp_path, option, message):
    for refused in run_ranks(refused_job, 1, options(dataset, tmp_path / "runs", "--device=cpu", option)):
        assert message in refused
    assert not (tmp_path / "runs").exists()
