"""Run a function on several real gloo ranks of this machine."""

import itertools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

# All that the ranks of a test would load, so that none of them does: half a second or a second each.
PRELOAD = ["ssr_rec.train", "torch.distributed.optim", "torch.utils.tensorboard", "tests.jobs", "pytest"]

# Below what the system gives to outgoing connections, and each process of tests from another on: a port that is free
# when it is looked for is bound by the ranks a moment later.
PORTS = itertools.count(9_271 * os.getpid())


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """What ``function(*args)`` returned on each rank; a failure on any rank fails with its traceback."""
    context = multiprocessing.get_context("forkserver")
    # Importing torchrec takes seconds; the fork server does it once for all ranks of all tests.
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, port, pipes[rank][1], args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = []
    try:
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(timeout), f"rank {rank} gave no result in {timeout} s"
            ok, value = receiver.recv()
            assert ok, f"rank {rank} of {world_size}:\n{value}"
            results.append(value)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return results


def be_rank(rank: int, world_size: int, port: int) -> None:
    """Set what a launcher would, for this process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def free_port() -> int:
    """A port that nobody listens on, and no other than this process will get for a while."""
    while True:
        port = 15_000 + next(PORTS) % 15_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue  # taken
        return port


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, pipe: Any, args: tuple[Any, ...]
) -> None:
    be_rank(rank, world_size, port)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        value = (True, function(*args))
    except BaseException:
        value = (False, traceback.format_exc())
    pipe.send(value)
    if dist.is_initialized():
        dist.destroy_process_group()
