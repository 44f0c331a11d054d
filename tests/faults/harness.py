"""Start the real training program on several ranks, hurt it, and see how it ends."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssr_rec.runs.report import read_report
from tests.ranks import PRELOAD, be_rank, free_port

MODEL = [
    "--over_arch.num_views=2",
    "--over_arch.view_dim=8",
    "--over_arch.fusion_dropout=0.1",
    "--embeddings.dim=8",
    "--train.batch_size=64",
    "--train.eval_batch_size=100",
    "--train.eval_every=10",
    "--train.epochs=3",
    "--train.log_every=1",
    "--checkpoint.every_steps=2",
    "--name=run",
]
STEPS = 48


def options(dataset: Path, runs: Path, *more: str) -> list[str]:
    return [*MODEL, f"--data.path={dataset}", f"--runs={runs}", *more]


class Job:
    """``train.py`` with the given arguments on ``world_size`` gloo ranks of this machine.

    Args:
        sabotage: called on every rank before the training starts, with ``sabotage_args``.
    """

    def __init__(
        self,
        arguments: list[str],
        world_size: int,
        folder: Path,
        sabotage: Callable[..., None] | None = None,
        *sabotage_args: Any,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"rank{rank}.out" for rank in range(world_size)]
        self.processes = [
            context.Process(
                target=_rank,
                args=(arguments, rank, world_size, port, self.outputs[rank], sabotage, sabotage_args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.is_alive():
                os.kill(process.pid, number)

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; a rank that is still there at the end of the time is a hang."""
        until = time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                self.send(signal.SIGKILL)
                raise AssertionError(f"rank {rank} hangs after {timeout} s:\n{self.said()}")
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """What all ranks printed, one after the other."""
        return "".join(output.read_text(errors="replace") for output in self.outputs if output.exists())


def _rank(
    arguments: list[str],
    rank: int,
    world_size: int,
    port: int,
    output: Path,
    sabotage: Callable[..., None] | None,
    sabotage_args: tuple[Any, ...],
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    be_rank(rank, world_size, port)
    import torch

    from ssr_rec.train import main

    torch.set_num_threads(1)
    if sabotage is not None:
        sabotage(rank, *sabotage_args)
    sys.exit(main(arguments))


def steps_done(runs: Path) -> int:
    """Rows of the run's metrics.jsonl so far, about one for every step."""
    path = runs / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(runs: Path) -> bool:
    return any((runs / "run" / "checkpoints").glob(".step-*.partial"))


def wait_until(condition: Callable[[], bool], job: Job, timeout: float = 120) -> bool:
    """Whether the condition came true while all ranks were running."""
    until = time.monotonic() + timeout
    while job.is_running():
        if condition():
            return True
        assert time.monotonic() < until, f"nothing happened in {timeout} s:\n{job.said()}"
        time.sleep(0.0005)
    return False


def hurt_at_random(job: Job, runs: Path, rng: random.Random, moment: str, ranks: list[int] | None) -> None:
    """SIGKILL at a random moment: at the "start", after a random "step" and a bit, or in the middle of a "save"."""
    step = rng.randrange(1, STEPS - 8)
    if moment == "start":
        time.sleep(rng.uniform(0.0, 0.5))
    elif moment == "step":
        wait_until(lambda: steps_done(runs) >= step, job)
        time.sleep(rng.uniform(0.0, 0.02))
    else:
        wait_until(lambda: steps_done(runs) >= step and is_saving(runs), job)
        time.sleep(rng.uniform(0.0, 0.003))
    job.send(signal.SIGKILL, ranks)


def report_of(runs: Path) -> dict[str, Any]:
    return read_report(runs / "run").values()
