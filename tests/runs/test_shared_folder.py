"""Ranks that do not see rank 0's run folder."""

from tests.checkpointing.test_resume import options
from tests.ranks import run_ranks
from tests.scale_jobs import elsewhere_job


def test_a_run_folder_that_is_not_shared_is_refused_by_every_rank(dataset, tmp_path):
    """Two working directories and a relative --runs: what two nodes with disks of their own are."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    relative = [o for o in options(dataset, tmp_path) if not o.startswith("--runs")] + ["--runs=runs"]
    for message in run_ranks(elsewhere_job, 2, relative, [str(folder) for folder in folders]):
        assert message.startswith("runs: rank 1 does not see runs/run/checkpoints, which rank 0 has made"), message
    assert not any(folders[1].iterdir()) and not (folders[0] / "runs" / "run").exists(), "nothing is left behind"
