"""Hold the planner's estimates against real CPU ranks: bytes of every rank, and the order of several plans' steps.

    torchrun --nproc_per_node 2 tools/check_plan_estimates.py

Every rank first measures what a datasheet would say of this machine (products, copies, all-to-all), the estimates are
made from that, and then the plans take turns of training on random batches in memory. The last line is JSON; exit code
1 when a rank's bytes are off by more than 5 %.
"""

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_training import Job, bare_job, random_batch
from scipy.stats import kendalltau
from tabulate import tabulate
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from ssr_rec.common.logs import quiet
from ssr_rec.config.run import load_config
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.plan_file import plan_of, write_plan
from ssr_rec.model.build import build_model
from ssr_rec.planning.cases import Case, make_world
from ssr_rec.planning.estimate import Estimate, estimate_plan
from ssr_rec.planning.hardware import Hardware, load_hardware
from ssr_rec.planning.remedies import Planned, plan_case
from ssr_rec.runs.provenance import hardware as this_machine
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.setup import start_process_group

WITHIN = 0.05
SINGLES, LISTS = 6, 6


@dataclass
class Plan:
    """Describes one way to train, its estimate and what was measured of it."""

    name: str
    case: Case
    estimate: Estimate
    run: Job
    measured_bytes: int
    seconds: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="rows of a global batch")
    parser.add_argument("--steps", type=int, default=10, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=7, help="turns of each plan, after one that does not count")
    arguments = parser.parse_args()
    quiet()
    device = start_process_group("cpu")
    torch.set_num_threads(1)
    hardware = measure_machine(dist.get_world_size())
    with tempfile.TemporaryDirectory() as folder:
        plans = [prepare(*variant, Path(folder), device) for variant in variants(hardware, arguments.batch)]
    for turn in range(arguments.turns + 1):
        for plan in plans:
            dist.barrier()
            start = time.perf_counter()
            plan.run(arguments.steps)
            dist.barrier()
            if turn:
                plan.seconds.append((time.perf_counter() - start) / arguments.steps)
    figures = compare(plans, hardware)
    dist.destroy_process_group()
    return 0 if figures["worst_bytes_error"] <= WITHIN else 1


def measure_machine(ranks: int) -> Hardware:
    """Describe this machine as a hardware file would, the same on every rank; ranks measure at the same time."""
    a = torch.rand(1024, 1024)
    product = best_of(lambda: a @ a)
    source, target = torch.rand(2**24), torch.empty(2**24)
    copied = best_of(lambda: target.copy_(source))
    pieces = torch.rand(2**20)
    exchanged = best_of(lambda: dist.all_to_all_single(torch.empty_like(pieces), pieces))
    small = torch.rand(ranks)
    latency = best_of(lambda: dist.all_to_all_single(torch.empty_like(small), small), 50)
    times = torch.tensor([product, copied, exchanged, latency], dtype=torch.float64)
    dist.all_reduce(times)
    product, copied, exchanged, latency = (times / ranks).tolist()
    gflops = 2 * 1024**3 / product / 1e9 * ranks
    bandwidth = 2 * source.nbytes / copied / 1e9 * ranks
    crossing = pieces.nbytes * (ranks - 1) / ranks
    base = load_hardware("cpu")
    rates = {"fp32": gflops / 1e3, "tf32": None, "bf16": gflops / 1e3}
    assumed = base.assumptions.model_copy(
        update={
            "gemm_utilisation": base.peak_tflops.model_copy(update={"fp32": 1.0, "bf16": 1.0}),
            "link_utilisation": 1.0,
            "collective_latency_us": latency * 1e6,
            "step_floor_ms": 0.0,
        }
    )
    return base.model_copy(
        update={
            "name": "this machine",
            "peak_tflops": base.peak_tflops.model_copy(update=rates),
            "memory_gb_s": bandwidth,
            "host_memory_gb_s": bandwidth,
            "link_gb_s": max(crossing, 1) / exchanged / 1e9,
            "assumptions": assumed,
        }
    )


def best_of(work: Callable[[], Any], times: int = 7) -> float:
    """Return seconds of the fastest call."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def variants(hardware: Hardware, batch: int) -> Iterator[tuple[str, Case, Callable[[str], int] | None]]:
    """Yield name, case, and table -> rank where the planner's own choice is overruled."""
    ranks = dist.get_world_size()
    last = ranks - 1
    ten, two = make_schema(10), make_schema(2)
    columns = "--sharding.types=[column_wise]"
    finer = "{" + ", ".join(f"{name}: {{min_partition: 16}}" for name in ten.feature_names) + "}"

    def case(schema: Schema, dim: int, width: int = 64, *more: str) -> Case:
        over_arch = f"--over_arch={{name: mlp, hidden: [{width}, {width}]}}"
        config = load_config(None, [f"--embeddings.dim={dim}", f"--train.batch_size={batch}", over_arch, *more])
        lengths = {f.name: (f.max_length or 2) / 2 for f in schema.features}
        return Case(config, schema, lengths, make_world(1, ranks, hardware))

    yield "dim 32, balanced", case(ten, 32), None
    yield "dim 32, all on one rank", case(ten, 32), lambda name: 0
    yield "dim 32, lists on one rank", case(ten, 32), lambda name: 0 if name.startswith("list") else last
    yield "dim 32, cut by columns", case(ten, 32, 64, columns, f"--sharding.per_table={finer}"), None
    yield "dim 8, balanced", case(ten, 8), None
    yield "dim 128, balanced", case(ten, 128), None
    yield "dim 128, all on one rank", case(ten, 128), lambda name: 0
    yield "dim 32, short lists", case(two, 32), None
    yield "dim 32, wide over-arch", case(ten, 32, 768), None


def make_schema(mean_length: int) -> Schema:
    """Return some tables of one id a row and some of lists."""
    features = [
        Feature(name=f"single_{i}", kind="categorical", num_embeddings=100_000, encoding=Drawn(column=""))
        for i in range(SINGLES)
    ] + [
        Feature(
            name=f"list_{i}",
            kind="list",
            num_embeddings=50_000,
            encoding=Drawn(column=""),
            max_length=2 * mean_length,
        )
        for i in range(LISTS)
    ]
    return Schema(name="random", dataset_id="", features=features, labels=["click"], splits={})


def prepare(name: str, case: Case, rank_of: Callable[[str], int] | None, folder: Path, device: torch.device) -> Plan:
    """Return the job of a case, sharded by its saved plan."""
    planned = plan_case(case)
    if rank_of is not None:
        planned = overrule(planned, rank_of)
    ranks, rank = case.world.size, dist.get_rank()
    path = folder / f"{rank}.json"
    write_plan(plan_of(planned.found.options, "cpu", ranks, ranks), path)
    sharding = case.config.sharding.model_copy(update={"types": [], "per_table": {}, "plan": str(path)})
    config = case.config.model_copy(update={"sharding": sharding})
    model = build_model(config, case.schema, device, ranks, ranks)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    rows = case.rows_per_rank
    batches = [random_batch(case.schema, rows, seed * ranks + rank) for seed in range(4)]
    return Plan(name, case, planned.estimate, bare_job(model, optimizer, batches), table_bytes(model), [])


def overrule(planned: Planned, rank_of: Callable[[str], int]) -> Planned:
    """Return the same tables, whole, each on the rank that is said."""
    for option in planned.found.options:
        assert len(option.shards) == 1, "only whole tables are moved"
        option.shards[0].rank = rank_of(option.name)
    return replace(planned, estimate=estimate_plan(planned.case, planned.found, planned.dense))


def table_bytes(model: DistributedModelParallel) -> int:
    """Return the bytes of this rank's shards and their optimizer state, from the tensors themselves."""
    tensors = [value for key, value in model.state_dict().items() if ".embedding_bags." in key]
    tensors += [t for values in model.fused_optimizer.state_dict()["state"].values() for t in values.values()]
    pieces = [s.tensor for t in tensors if isinstance(t, ShardedTensor) for s in t.local_shards()]
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def compare(plans: list[Plan], hardware: Hardware) -> dict[str, Any]:
    """Print planned against measured on rank 0."""
    errors, rows = [], []
    for plan in plans:
        measured: list[int] = [0] * plan.case.world.size
        dist.all_gather_object(measured, plan.measured_bytes)
        planned = [memory.weights + memory.optimizer for memory in plan.estimate.memory]
        # A rank without tables has nothing to be wrong about; its state may be an empty tensor.
        off = [abs(m - p) / max(m, p) for m, p in zip(measured, planned, strict=True) if max(m, p) > 4096]
        errors.append(max(off))
        step = plan.estimate.step
        milliseconds = 1000 * statistics.median(plan.seconds)
        mib = " ".join(f"{p / 2**20:.1f}/{m / 2**20:.1f}" for p, m in zip(planned, measured, strict=True))
        rows.append([plan.name, f"{step.device:.1f}", f"{milliseconds:.1f}", mib, f"{100 * errors[-1]:.2f} %"])
    estimated = [plan.estimate.step.device for plan in plans]
    taken = [1000 * statistics.median(plan.seconds) for plan in plans]
    tau = kendalltau(estimated, taken).statistic
    figures = {
        "ranks": dist.get_world_size(),
        "kendall_tau": tau,
        "worst_bytes_error": max(errors),
        "plans": {
            plan.name: {
                "estimated_ms": round(e, 2),
                "measured_ms": round(m, 2),
                "spread_ms": [round(1000 * min(plan.seconds), 2), round(1000 * max(plan.seconds), 2)],
            }
            for plan, e, m in zip(plans, estimated, taken, strict=True)
        },
        "machine": {
            "tflops": hardware.peak_tflops.fp32,
            "memory_gb_s": hardware.memory_gb_s,
            "link_gb_s": hardware.link_gb_s,
            "latency_us": hardware.assumptions.collective_latency_us,
        },
        "hardware": this_machine(),
    }
    if dist.get_rank() == 0:
        head = ["plan", "estimated ms", "measured ms", "MiB planned/measured, each rank", "off by"]
        rows.sort(key=lambda row: float(row[1]))
        print(tabulate(rows, head, tablefmt="simple", disable_numparse=True))
        print(f"Kendall's tau of {len(plans)} plans: {tau:.2f}; bytes off by at most {100 * max(errors):.2f} %")
        print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(main())
