"""Hold the planner against jobs on this machine's CPU: one of the processes that tools/check_planner.py --cpu starts.

    torchrun --nproc_per_node 2 tools/check_planner_cpu.py

Every rank first measures what a hardware file would say of this machine (products, copies, lookups, all-to-all) and the
Python of one tiny job; the estimates are made from that, and the jobs take turns of training on random batches in
memory, by the pipeline of training. The last line is JSON; exit code 1 when a rank's bytes are off by more than 5 %.
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
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_training import Job, random_batch
from calibrate_hardware import SHAPES, lookup_costs
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
from ssr_rec.planning.hardware import Hardware, LookupCosts, load_hardware
from ssr_rec.planning.remedies import Planned, plan_case
from ssr_rec.runs.provenance import hardware as this_machine
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.pipeline import build_pipeline
from ssr_rec.training.setup import start_process_group

WITHIN = 0.05
SINGLES, LISTS = 6, 6
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


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
    parser.add_argument("--steps", type=int, default=6, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=7, help="turns of each plan, after one that does not count")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the processors, for a machine with other work"
    )
    arguments = parser.parse_args()
    quiet()
    clock = CLOCKS[arguments.clock]
    device = start_process_group("cpu")
    torch.set_num_threads(1)
    hardware = measure_machine(dist.get_world_size(), clock)
    with tempfile.TemporaryDirectory() as folder:
        hardware = measure_python(hardware, Path(folder), device, clock)
        plans = [prepare(*variant, Path(folder), device) for variant in variants(hardware, arguments.batch)]
    measure_steps(plans, arguments.steps, arguments.turns, clock)
    figures = compare(plans, hardware)
    dist.destroy_process_group()
    return 0 if figures["worst_bytes_error"] <= WITHIN else 1


def measure_steps(plans: list[Plan], steps: int, turns: int, clock: Clock) -> None:
    """Let the jobs take turns, after one that does not count, and note the seconds of a step of the slowest rank."""
    for turn in range(turns + 1):
        for plan in plans:
            dist.barrier()
            start = clock()
            plan.run(steps)
            taken = torch.tensor((clock() - start) / steps, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn:
                plan.seconds.append(float(taken))


def measure_machine(ranks: int, clock: Clock) -> Hardware:
    """Describe this machine as a hardware file would, the same on every rank; ranks measure at the same time."""

    def seconds(work: Callable[[], Any], times: int = 9) -> float:
        taken = []
        for _ in range(times):
            start = clock()
            work()
            taken.append(clock() - start)
        return sorted(taken)[times // 4]

    pairs = [(torch.rand(2048, a), torch.rand(a, b)) for a, b in SHAPES]
    product = seconds(lambda: [x @ w for x, w in pairs])
    source, target = torch.rand(2**24), torch.empty(2**24)
    copied = seconds(lambda: target.copy_(source))
    pieces = torch.rand(2**20)
    exchanged = seconds(lambda: dist.all_to_all_single(torch.empty_like(pieces), pieces))
    small = torch.rand(ranks)
    latency = seconds(lambda: dist.all_to_all_single(torch.empty_like(small), small), 50)
    lookups = lookup_costs(seconds)
    measured = torch.tensor([product, copied, exchanged, latency, *lookups.values()], dtype=torch.float64)
    dist.all_reduce(measured)
    product, copied, exchanged, latency, *nanoseconds = (measured / ranks).tolist()
    tflops = sum(2 * 2048 * a * b for a, b in SHAPES) / product / 1e12 * ranks
    bandwidth = 2 * source.nbytes / copied / 1e9 * ranks
    crossing = pieces.nbytes * (ranks - 1) / ranks
    base = load_hardware("cpu")
    rates = {"fp32": tflops, "tf32": None, "bf16": tflops}
    assumed = base.assumptions.model_copy(
        update={
            "gemm_utilisation": base.peak_tflops.model_copy(update={"fp32": 1.0, "bf16": 1.0}),
            "link_utilisation": 1.0,
            "collective_latency_us": latency * 1e6,
            # Of the whole machine, as all of its figures: each rank has its share.
            "lookup_ns": LookupCosts(**dict(zip(("bag", "id", "byte"), (n / ranks for n in nanoseconds), strict=True))),
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


def measure_python(hardware: Hardware, folder: Path, device: torch.device, clock: Clock) -> Hardware:
    """Return the hardware with ``host_speed`` such that the planner says of one tiny job what it takes here."""
    config = load_config(None, ["--embeddings.dim=8", "--train.batch_size=64", "--over_arch={name: mlp, hidden: [8]}"])
    ranks = dist.get_world_size()
    tiny = prepare("tiny", Case(config, make_schema(1, 0), {}, make_world(1, ranks, hardware)), None, folder, device)
    measure_steps([tiny], 40, 5, clock)
    step = tiny.estimate.step
    busy = 1000 * min(tiny.seconds) - step.device
    speed = max(0.1, step.host / busy) if busy > 0 else 10.0
    assumed = hardware.assumptions.model_copy(update={"host_speed": speed})
    return hardware.model_copy(update={"assumptions": assumed})


def variants(hardware: Hardware, batch: int) -> Iterator[tuple[str, Case, Callable[[str], int] | None]]:
    """Yield name, case, and table -> rank where the planner's own choice is overruled."""
    ranks = dist.get_world_size()
    ten, two, singles = make_schema(10), make_schema(2), make_schema(1, 0, 40)

    def case(schema: Schema, dim: int, over_arch: str = "mlp, hidden: [64, 64]", rows: int = batch, *more: str) -> Case:
        arch = f"--over_arch={{name: {over_arch}}}"
        config = load_config(None, [f"--embeddings.dim={dim}", f"--train.batch_size={rows}", arch, *more])
        lengths = {f.name: (f.max_length or 2) / 2 for f in schema.features}
        return Case(config, schema, lengths, make_world(1, ranks, hardware))

    yield "dim 8, lists of 10", case(ten, 8), None
    yield "dim 32, lists of 2", case(two, 32), None
    yield "dim 32, lists of 10", case(ten, 32), None
    yield "dim 128, lists of 10", case(ten, 128), None
    yield "dim 32, wide MLP", case(ten, 32, "mlp, hidden: [768, 768]"), None
    yield "40 tables, dim 16", case(singles, 16), None
    yield "40 tables, dim 16, batch 512", case(singles, 16, rows=512), None
    yield "40 tables, dim 16, DCN v2", case(singles, 16, "dcn_v2, hidden: [256, 256]"), None
    yield "40 tables, dim 16, SSR-S", case(singles, 16, "ssr, filter: static, num_views: 4, view_dim: 128"), None
    if ranks > 1:
        yield "dim 32, all on one rank", case(ten, 32), lambda name: 0
    else:
        yield "dim 32, Adagrad", case(ten, 32, "mlp, hidden: [64, 64]", batch, "--embeddings.optimizer=adagrad"), None


def make_schema(mean_length: int, lists: int = LISTS, singles: int = SINGLES) -> Schema:
    """Return some tables of one id a row and some of lists."""
    features = [
        Feature(name=f"single_{i}", kind="categorical", num_embeddings=100_000, encoding=Drawn(column=""))
        for i in range(singles)
    ] + [
        Feature(
            name=f"list_{i}",
            kind="list",
            num_embeddings=50_000,
            encoding=Drawn(column=""),
            max_length=2 * mean_length,
        )
        for i in range(lists)
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
    pipeline = build_pipeline(model, optimizer, device, config.train)
    model.train()

    def run(steps: int) -> None:
        feed = islice(cycle(batches), steps)
        for _ in range(steps):
            pipeline.progress(feed)

    return Plan(name, case, planned.estimate, run, table_bytes(model), [])


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
    found = []
    for plan in plans:
        measured: list[int] = [0] * plan.case.world.size
        dist.all_gather_object(measured, plan.measured_bytes)
        planned = [memory.weights + memory.optimizer for memory in plan.estimate.memory]
        # A rank without tables has nothing to be wrong about; its state may be an empty tensor.
        off = [abs(m - p) / max(m, p) for m, p in zip(measured, planned, strict=True) if max(m, p) > 4096]
        step, milliseconds = plan.estimate.step, [1000 * seconds for seconds in plan.seconds]
        found.append(
            {
                "job": plan.name,
                "planned_ms": step.total,
                "measured_ms": statistics.median(milliseconds),
                "spread_ms": [min(milliseconds), max(milliseconds)],
                "parts_ms": asdict(step),
                "bytes_error": max(off),
            }
        )
    ratios = [row["planned_ms"] / row["measured_ms"] for row in found]
    figures = {
        "ranks": dist.get_world_size(),
        "worst_ratio": max(max(ratio, 1 / ratio) for ratio in ratios),
        "kendall_tau": kendalltau(*zip(*((r["planned_ms"], r["measured_ms"]) for r in found), strict=True)).statistic,
        "worst_bytes_error": max(row["bytes_error"] for row in found),
        "jobs": found,
        "machine": hardware.model_dump(mode="json"),
        "hardware": this_machine(),
    }
    if dist.get_rank() == 0:
        rows = [
            [row["job"], *(f"{row[key]:.1f}" for key in ("planned_ms", "measured_ms")), f"{ratio:.2f}"]
            for row, ratio in zip(found, ratios, strict=True)
        ]
        print(tabulate(rows, ["job", "planned ms", "measured ms", "ratio"], tablefmt="github", disable_numparse=True))
        print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(main())
