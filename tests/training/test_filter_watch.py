"""What a run says of its filters while it trains, against what the filters gave in that step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from ssr_rec.training.filter_watch import WATCHED_ROWS, FilterWatch, per_layer
from tests.checkpointing.test_resume import options
from tests.ranks import run_ranks
from tests.training.test_trainer import made


def test_figures_are_of_the_last_training_output_alone() -> None:
    filters = [torch.nn.ReLU(), torch.nn.Identity()]
    watch = FilterWatch(filters)
    assert watch.figures().numel() == 0
    rows = torch.randn(WATCHED_ROWS + 40, 3, 5, generator=torch.Generator().manual_seed(0))
    filters[1](filters[0](rows + 1))
    filters[1](filters[0](rows))
    for one in filters:
        one.eval()
    filters[1](filters[0](-rows))
    kept = [max(float(value), 0.0) for value in rows[:WATCHED_ROWS].flatten()]
    zeros, mean = sum(value == 0 for value in kept) / len(kept), sum(kept) / len(kept)
    (first, second) = per_layer((2 * watch.figures()).tolist())
    assert first == second
    assert abs(first["sparsity"] - zeros) < 1e-6 and abs(first["magnitude"] - mean) < 1e-6


def test_a_rank_without_rows_of_the_last_batch_has_no_say() -> None:
    one, none = FilterWatch([relu := torch.nn.ReLU()]), FilterWatch([empty := torch.nn.ReLU()])
    relu(rows := torch.randn(9, 2, 4))
    empty(rows[:0])
    assert per_layer((one.figures() + none.figures()).tolist()) == per_layer(one.figures().tolist())


def filters_job(arguments: list[str], dataset: Path, folder: Path) -> list[tuple[dict, list]]:
    """Rows of training, each with this rank's own zeros and mean of the last step's filter outputs."""
    trainer = made(arguments, dataset, folder / f"rank{dist.get_rank() if dist.is_initialized() else 0}")
    last: dict[int, torch.Tensor] = {}
    for index, one in enumerate(trainer.over_arch.sparse_filters()):
        one.register_forward_hook(
            lambda m, _, output, i=index: last.update({i: output.detach().clone()} if m.training else {})
        )
    found = []
    for row in trainer.fit():
        own = [[(h == 0).float().mean().item(), h.abs().mean().item()] for _, h in sorted(last.items())]
        found.append((row, own))
    return found


def test_progress_rows_have_the_filters_of_that_step(dataset: Path, tmp_path: Path) -> None:
    settings = ["--over_arch.filter=dynamic", "--train.max_steps=8", "--train.log_every=4", "--train.batch_size=128"]
    (found,) = run_ranks(filters_job, 1, options(dataset, tmp_path, *settings), dataset, tmp_path)
    trained = [(row, own) for row, own in found if row["split"] == "train"]
    assert [row["step"] for row, _ in trained] == [4, 8]
    for row, own in trained:
        assert len(row["filters"]) == len(own) == 2
        for layer, (zeros, mean) in zip(row["filters"], own, strict=True):
            assert abs(layer["sparsity"] - zeros) < 1e-6 and abs(layer["magnitude"] - mean) < 1e-6
            assert 0 < layer["sparsity"] < 1
    assert all("filters" not in row for row, _ in found if row["split"] != "train")


def test_a_static_filter_has_no_such_figures(dataset: Path, tmp_path: Path) -> None:
    settings = ["--over_arch.filter=static", "--train.max_steps=2", "--train.log_every=2"]
    (found,) = run_ranks(filters_job, 1, options(dataset, tmp_path, *settings), dataset, tmp_path)
    assert found and all("filters" not in row for row, _ in found)
