"""Down-sampling of negative training rows: which rows stay, and that the model's logits are of all rows."""

from __future__ import annotations

import math
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema
from ssr_rec.data.synthetic.config import SyntheticConfig
from ssr_rec.data.synthetic.write import ensure_synthetic
from ssr_rec.model.loss import TrainTask
from tests.cases import one_quick
from tests.jobs import train_job
from tests.prepare_log import make_rows, md5_id, run, spec_with, write_csv, write_parquet
from tests.ranks import run_ranks
from tools.prepare_data import main

MASK = 2**31 - 1
HISTORY = {"by": "user", "order": "day", "columns": ["city"]}
TIME = {"type": "time", "column": "day", "boundaries": ["2024-01-12", "2024-01-16"]}


def place(row: int, seed: int) -> int:
    """Where a row lies in the shuffle, as docs/data.md defines it."""
    x = (row ^ ((row >> 31) * 0x7FEB352D + (seed * 0x9E3779B1 + 0x2C1B3C6D) % 2**31)) & MASK
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x046CA68B), (13, 0x05EBCA6B)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK
    return x ^ (x >> 16)


def stays(row: int, seed: int, share: float) -> bool:
    """Whether a negative training row stays, as docs/data.md defines it."""
    y = place(row, seed)
    for shift, multiplier in ((16, 0x05EBCA6B), (15, 0x7FEB352D), (13, 0x046CA68B)):
        y = ((y ^ (y >> shift)) * multiplier) & MASK
    return (y ^ (y >> 16)) < share * 2**31


@pytest.mark.parametrize("split", one_quick(TIME, {"type": "random", "ratios": [6, 2, 2]}))
def test_positives_and_the_drawn_negatives_of_training_stay(split, tmp_path):
    rows, seed = make_rows(3000), 5
    path = write_parquet(rows, tmp_path / "log.parquet")
    whole, all_rows = run(tmp_path, [path], spec_with(split=split), "whole", seed=seed)
    schema, found = run(tmp_path, [path], spec_with(split=split, negatives=0.3), "some", seed=seed)
    number = {md5_id(row["uid"], 2**30): row["uid"] for row in rows}
    trained = [(number[row["uid"]], row["click"]) for row in all_rows["train"]]
    kept = [(number[row["uid"]], row["click"]) for row in found["train"]]
    assert kept == [(uid, click) for uid, click in trained if click or stays(uid, seed, 0.3)]
    negatives = sum(not click for _, click in trained)
    # Independent of what made it a training row: three standard errors of a draw.
    share = (len(kept) - sum(click for _, click in kept)) / negatives
    assert abs(share - 0.3) < 3 * math.sqrt(0.21 / negatives)
    for name in ("validation", "test"):
        assert [row["uid"] for row in found[name]] == [row["uid"] for row in all_rows[name]]
    assert (schema.negatives, whole.negatives) == (0.3, 1.0) and schema.dataset_id != whole.dataset_id
    assert "negatives" not in (tmp_path / "whole/schema.json").read_text()
    assert Schema.read(tmp_path / "some").negatives == 0.3


@pytest.mark.slow
def test_neither_files_nor_threads_change_which_rows_stay(tmp_path, capsys):
    rows = make_rows(900)
    paths = [write_csv(rows[:400], tmp_path / "a.csv"), write_csv(rows[400:], tmp_path / "b.csv")]
    spec = spec_with(split=TIME, negatives=0.5)
    one, _ = run(tmp_path, [write_csv(rows, tmp_path / "all.csv")], spec, "one")
    two, _ = run(tmp_path, paths, spec, "two")
    assert one.dataset_id == two.dataset_id
    yaml = tmp_path / "spec.yaml"
    yaml.write_text(spec_with(split=TIME).model_dump_json())  # JSON is YAML
    command = ["table", "--spec", str(yaml), "--input", str(tmp_path / "all.csv"), "--negatives", "0.5"]
    assert main([*command, "--output", str(tmp_path / "three")]) == 0
    assert Schema.read(tmp_path / "three").dataset_id == one.dataset_id


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"negatives": 0.0}, "negatives"),
        ({"negatives": 1.5}, "negatives"),
        (
            {"negatives": 0.5, "labels": ["click", "price"], "numeric": []},
            "labels click, price: a row that is",
        ),
        ({"negatives": 0.5, "split": {"type": "days", "column": "day"}}, "the splits are days"),
        (
            {
                "negatives": 0.5,
                "sequences": {"seen": {"max_length": 3, "from_log": HISTORY}},
            },
            "sequence 'seen' is made from the log",
        ),
    ],
)
def test_what_one_shift_would_not_undo_is_refused(changes: dict[str, Any], said):
    with pytest.raises(UserError, match=said):
        spec_with(**changes)


def test_a_share_that_leaves_no_negative_is_refused(tmp_path):
    path = write_parquet(make_rows(60), tmp_path / "log.parquet")
    with pytest.raises(UserError, match="no negative row is left to train on"):
        run(tmp_path, [path], spec_with(split=TIME, negatives=1e-9))
    assert not (tmp_path / "out").exists()


class Fixed(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, sparse: Any, dense: Any, item_weights: Any) -> torch.Tensor:
        return self.logits


class FixedBatch:
    sparse = group_ids = weights = dense = item_weights = runs = None
    labels = torch.tensor([[1.0], [0.0], [0.0]])
    global_rows = 3


def test_the_loss_is_of_shifted_logits_and_the_outputs_are_not():
    logits = torch.tensor([[0.3], [-1.2], [0.7]])
    task = TrainTask(Fixed(logits), [1.0], negatives=0.1)  # type: ignore[arg-type]
    odds = logits.exp() / 0.1
    p = odds / (1 + odds)
    wanted = -(p[0].log() + (1 - p[1]).log() + (1 - p[2]).log()) / 3
    loss, (_, outputs, *_) = task(FixedBatch())  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and torch.equal(outputs, logits)
    assert task.eval()(FixedBatch())[0].item() < loss.item()  # type: ignore[arg-type]


SMALL_FIELDS = [
    *("user_age", "user_tenure", "user_city", "item_price", "item_category", "hour", "position", "device"),
]


@pytest.mark.slow
def test_calibration_on_the_full_test_is_right_and_little_auc_is_lost(tmp_path, capsys):
    """One per cent of 2M rows are clicks; a tenth of the negatives is trained on."""
    counts = {"train_rows": 2_000_000, "validation_rows": 20_000, "test_rows": 20_000}
    config = SyntheticConfig(**counts, num_fields=15, users=500, items=500, click_rate=0.01, pay_rate=0.001)
    log = ensure_synthetic(config, tmp_path / "log")
    names = [name for name in Schema.read(log).feature_names if name not in SMALL_FIELDS]
    spec = {
        "name": "rare",
        "labels": ["click"],
        # Ids that a model learns by heart would put it off by more than the sampling does.
        "ignore": ["pay", "__group_id__", *names],
        "categorical": SMALL_FIELDS,
        "split": {"type": "random", "ratios": [6, 1, 3]},
    }
    found: dict[float, dict[str, Any]] = {}
    for share, epochs, steps in ((1.0, 1, 293), (0.1, 4, 128)):
        data = tmp_path / f"data{share}"
        run(tmp_path, [log / "train"], make_spec({**spec, "negatives": share}, "test"), data.name)
        options = [f"--data.path={data}", f"--runs={tmp_path}", f"--name=run{share}", f"--train.epochs={epochs}"]
        options += ["--over_arch.name=mlp", "--over_arch.hidden=[16]", "--train.batch_size=4096"]
        options += ["--train.eval_batch_size=16384", "--optimizer.learning_rate=5e-3", f"--train.eval_every={steps}"]
        options += [f"--{part}.schedule={{name: linear, steps: {steps}}}" for part in ("optimizer", "embeddings")]
        report = run_ranks(train_job, 1, options)[0]
        found[share] = {**report["test"]["click"], "rows": report["dataset"]["num_rows"]}
    error = 1 / math.sqrt(sum(row["click"] for row in pq.read_table(data / "test", columns=["click"]).to_pylist()))
    with capsys.disabled():
        for share, figures in found.items():
            keys = ("rows", "auc", "calibration", "ne", "logloss")
            print(f"\nnegatives {share}: { ({key: figures[key] for key in keys}) }, error of the rate {error:.4f}")
    assert abs(found[0.1]["calibration"] - found[1.0]["calibration"]) < 0.02
    assert abs(found[0.1]["calibration"] - 1) < 0.02 + 2 * error
    assert found[1.0]["auc"] - found[0.1]["auc"] < 0.01
