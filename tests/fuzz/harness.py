"""Feed mutated inputs to a target in processes of their own, where a hang or a native crash is a finding, not the end.

Case ``index`` of a target depends on (SEED, target, index) alone, so a finding is repeated by its number.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ssr_rec.common.errors import UserError
from tests.ranks import PRELOAD

SEED = 20261122
WORKERS = 2
LIMIT_SECONDS = 20
"""A case takes milliseconds, on a busy machine now and then seconds."""
START_SECONDS = 120
"""The first worker waits until the fork server has imported torch."""
MEMORY_BYTES = 4 * 2**30
"""What a case may take beyond what the worker has: less than the machine, so that a bomb fails here alone."""


@dataclass(frozen=True)
class Target:
    """What is fed.

    Attributes:
        prepare: (empty folder) -> state, once per worker: the intact input and what it gives.
        run: (state, folder, rng) -> outcome: draws one input, leaves it under ``folder``, feeds it and checks the
            promise; raises AssertionError (or anything else) where the promise is broken.
    """

    name: str
    prepare: Callable[[Path], Any]
    run: Callable[[Any, Path, np.random.Generator], str]


def rng_of(target: str, index: int) -> np.random.Generator:
    return np.random.default_rng((SEED, int.from_bytes(hashlib.sha256(target.encode()).digest()[:4], "big"), index))


def refusal(error: BaseException, *culprits: str) -> str:
    """Check that an error is what bad input promises: one line by this package that names the culprit."""
    assert isinstance(error, UserError), f"{type(error).__name__} instead of a UserError: {error}"
    message = str(error)
    assert len(message.splitlines()) == 1 and len(message) < 2_000, f"not one line: {message[:3000]!r}"
    assert any(culprit in message for culprit in culprits), f"names none of {culprits}: {message}"
    return "refused"


def fuzz(target: Target, cases: int, folder: Path, keep: Path) -> Counter[str]:
    """Run the first ``cases`` cases and count their outcomes.

    Raises:
        AssertionError: with every case that broke the promise: its number, what happened, where its input is kept.
    """
    findings: list[str] = []
    outcomes: Counter[str] = Counter()
    numbers, lock = iter(range(cases)), Lock()

    def drive(worker_number: int) -> None:
        for index, outcome, detail in _worked(target, numbers, lock, folder / str(worker_number), keep):
            outcomes[outcome] += 1
            if detail:
                findings.append(f"case {index} of {target.name} (seed {SEED}): {outcome}: {detail}")

    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(drive, number) for number in range(WORKERS)]:
            done.result()
    assert not findings, f"{len(findings)} findings, inputs kept in {keep}\n" + "\n".join(sorted(findings)[:20])
    assert sum(outcomes.values()) == cases
    return outcomes


def _worked(
    target: Target, numbers: Iterator[int], lock: Lock, folder: Path, keep: Path
) -> Iterator[tuple[int, str, str]]:
    """(case, outcome, detail of a finding) of the cases that this worker takes, a new process after each it loses."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process, pipe = None, None
    try:
        while True:
            with lock:
                index = next(numbers, None)
            if index is None:
                return
            if process is None or pipe is None:
                pipe, theirs = context.Pipe()
                shutil.rmtree(folder, ignore_errors=True)
                process = context.Process(target=_serve, args=(target, folder, theirs), daemon=True)
                process.start()
                theirs.close()
                assert pipe.poll(START_SECONDS), "the worker did not start"
                pipe.recv()
            pipe.send(index)
            if not pipe.poll(LIMIT_SECONDS):
                outcome, detail = "hang", f"no answer in {LIMIT_SECONDS} s"
            else:
                try:
                    outcome, detail = pipe.recv()
                except EOFError:
                    process.join()
                    outcome, detail = "death", f"exit code {process.exitcode}"
            if detail:
                shutil.copytree(folder / "case", keep / f"{target.name}-{index}", symlinks=True, ignore=_pipes)
            if outcome in ("hang", "death"):
                process.kill()
                process.join()
                process = None
            yield index, outcome, detail
    finally:
        if process is not None:
            process.kill()


def _pipes(folder: str, names: list[str]) -> list[str]:
    """Names that cannot be copied."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if path.exists() and not (path.is_file() or path.is_dir())]


def _serve(target: Target, folder: Path, pipe: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    (folder / "base").mkdir(parents=True)
    state = target.prepare(folder / "base")
    pipe.send("ready")
    while True:
        index = pipe.recv()
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        try:
            pipe.send((target.run(state, case, rng_of(target.name, index)), ""))
        except BaseException:
            pipe.send(("finding", traceback.format_exc()[-3_000:]))
