"""Writes a plan for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tabulate import tabulate

from ssr_rec.common.formatting import short_number
from ssr_rec.planning.cases import Case
from ssr_rec.planning.costs import gemm_precision
from ssr_rec.planning.estimate import UNBALANCED, Estimate, memory_fields
from ssr_rec.planning.explain import GIB, Overflow, TablePlan
from ssr_rec.planning.remedies import Planned
from ssr_rec.planning.search import Found

MOST_TABLES = 20
MOST_RANKS = 16


def report(planned: Planned, tables: list[TablePlan], total_rows: float, all_tables: bool = False) -> str:
    """Return the whole report of a plan that fits."""
    estimate = planned.estimate
    parts = [
        headline(planned),
        tables_text(tables, len(tables) if all_tables else MOST_TABLES),
        memory_text(estimate),
        time_text(estimate),
        step_text(estimate, total_rows),
    ]
    if estimate.is_unbalanced:
        parts.append(unbalanced_text(planned.found, estimate))
    return "\n\n".join(parts)


def headline(planned: Planned) -> str:
    case, dense, options = planned.case, planned.dense, planned.found.options
    schema, config = case.schema, case.config
    ids = sum(feature.num_embeddings for feature in schema.features)
    return (
        f"{schema.name} on {case.world}: {'fits' if planned.fits else 'DOES NOT FIT'}\n"
        f"{len(schema.features)} features, {short_number(ids)} ids, {len(options)} tables of "
        f"{short_number(sum(option.tensor.numel() for option in options))} parameters, "
        f"{config.embeddings.optimizer}; {config.over_arch.label}: {short_number(dense.parameters)} dense parameters, "
        f"{short_number(dense.matmul_flops)}FLOPs a row forward, {gemm_precision(case)}\n"
        f"global batch {config.train.batch_size}, {case.rows_per_rank} rows a rank; planned in "
        f"{planned.found.seconds:.1f} s"
    )


def tables_text(tables: Sequence[TablePlan], most: int) -> str:
    """Return the largest tables one by one, the others by how they are sharded."""
    shown, rest = tables[:most], tables[most:]
    rows = [
        [
            table.name,
            short_number(table.rows),
            table.columns,
            table.dtype,
            _size(table.device_bytes + table.host_bytes),
            table.sharding_type,
            table.kernel,
            rank_list(table.ranks),
            f"{table.ms:.3g}",
            table.why,
        ]
        for table in shown
    ]
    head = ["table", "rows", "dim", "type", "size", "sharding", "kernel", "ranks", "ms", "why"]
    text = tabulate(rows, head, tablefmt="simple", disable_numparse=True)
    ways = Counter((table.sharding_type, table.kernel) for table in rest)
    for (sharding_type, kernel), count in ways.most_common():
        alike = [t for t in rest if (t.sharding_type, t.kernel) == (sharding_type, kernel)]
        size = _size(sum(t.device_bytes + t.host_bytes for t in alike))
        text += f"\n... and {count} smaller, {sharding_type} {kernel}: {size}, {sum(t.ms for t in alike):.3g} ms"
    return text


def memory_text(estimate: Estimate) -> str:
    """Return GiB of every rank; of many ranks, those with the least room."""
    names = memory_fields()
    has_host = any(memory.host for memory in estimate.memory)
    rows = []
    for rank in _shown([memory.headroom for memory in estimate.memory]):
        memory = estimate.memory[rank]
        row = [rank, *(_gib(getattr(memory, name)) for name in names), _gib(memory.headroom)]
        rows.append([*row, _gib(memory.host)] if has_host else row)
    head = ["rank", *names, "headroom", *(["host"] if has_host else [])]
    titles = {"dense": "dense+grad+Adam"}
    note = f"GiB of {_gib(estimate.memory[0].capacity)}" + _only(len(rows), len(estimate.memory), "least room")
    return f"{note}\n" + tabulate(rows, [titles.get(h, h) for h in head], tablefmt="simple", disable_numparse=True)


def time_text(estimate: Estimate) -> str:
    """Return milliseconds of every rank's tables; of many ranks, the slowest."""
    rows = [
        [rank, *(f"{value:.3f}" for value in (time.lookup, time.exchange, time.total, time.ids))]
        for rank, time in ((rank, estimate.time[rank]) for rank in _shown([-t.total for t in estimate.time]))
    ]
    note = "ms of a step, the tables of a rank" + _only(len(rows), len(estimate.time), "slowest")
    head = ["rank", "lookup", "all-to-all", "both", "ids (hidden)"]
    return f"{note}\n" + tabulate(rows, head, tablefmt="simple", disable_numparse=True)


def step_text(estimate: Estimate, total_rows: float) -> str:
    step = estimate.step
    speed, least, most = (short_number(s) for s in (estimate.samples_per_s, *estimate.samples_range))
    return (
        f"step {step.total:.2f} ms, mostly {step.bound}: lookup {step.lookup:.2f} + all-to-all {step.all_to_all:.2f} + "
        f"dense compute {step.dense:.2f} + all-reduce {step.exposed_all_reduce:.2f} (of {step.all_reduce:.2f}, the "
        f"rest hidden) = {step.device:.2f} ms of the device's, {step.host:.2f} of the host's, "
        f"{100 * step.serial_share:.0f} % of the shorter not hidden\n"
        f"imbalance {estimate.imbalance:.2f} (slowest rank over mean), waiting for it adds "
        f"{100 * estimate.waiting_share:.1f} % to the step\n"
        f"{speed} samples/s, expect {least} to {most}; {short_number(total_rows)} rows in "
        f"{days(estimate.days(total_rows))}; communication alone would allow "
        f"{short_number(estimate.communication_samples_per_s)} samples/s\n"
        f"The range is {estimate.within:g} times either way: docs/planner.md says what was held against estimates."
    )


def unbalanced_text(found: Found, estimate: Estimate) -> str:
    """Return which table makes the slowest rank slow."""
    slowest = max(range(len(estimate.time)), key=lambda rank: estimate.time[rank].total)
    loads = sorted(
        ((shard.perf.total, option) for option in found.options for shard in option.shards if shard.rank == slowest),
        key=lambda load: -load[0],
    )
    ms, option = loads[0]
    rank_ms = estimate.time[slowest].total
    return (
        f"warning: unbalanced: rank {slowest} takes {rank_ms:.2f} ms, the mean rank "
        f"{rank_ms - estimate.step.waiting:.2f}, which adds {100 * estimate.waiting_share:.0f} % to the step (more "
        f"than {100 * UNBALANCED:.0f} %).\nTable {option.name} ({option.sharding_type}) takes {ms:.2f} ms of it, the "
        f"most of the {len(loads)} on that rank"
    )


def overflow_text(case: Case, over: Sequence[Overflow], estimate: Estimate) -> str:
    """Return what is too much where, for a plan that does not fit."""
    lines = [str(overflow) for overflow in over[:4]]
    if len(over) > 4:
        lines.append(f"... and {len(over) - 4} more of {case.world.size} ranks are over")
    memory = estimate.memory[over[0].rank]
    tables = memory.weights + memory.optimizer
    lines.append(
        f"Without tables a rank has {_gib(memory.capacity - (memory.used - tables))} GiB of {_gib(memory.capacity)} "
        f"left for them: dense {_gib(memory.dense)}, activations {_gib(memory.activations)}, buffers "
        f"{_gib(memory.buffers)}, reserved {_gib(memory.reserved)}"
    )
    return "\n".join(lines)


def days(count: float) -> str:
    """Write a time as ``3.2 days``, ``5.1 hours``, ``12 minutes``, ``40 s``."""
    for unit, size in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count * 86_400:.3g} s"


def rank_list(ranks: Sequence[int]) -> str:
    """Write ranks as ``0-7,12``: runs of neighbours are joined."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:6])
    return text + (",..." if len(runs) > 6 else "")


def _shown(keys: Sequence[float]) -> list[int]:
    """Return the ranks to show: all, in order, or the few with the smallest key."""
    ranks = range(len(keys))
    return list(ranks) if len(keys) <= MOST_RANKS else sorted(ranks, key=lambda rank: keys[rank])[:8]


def _only(shown: int, ranks: int, which: str) -> str:
    return f"; the {shown} of {ranks} ranks with the {which}" if shown < ranks else ""


def _size(size: float) -> str:
    unit, divisor = ("GiB", GIB) if size >= 0.1 * GIB else ("MiB", GIB / 1024)
    return f"{size / divisor:.3g} {unit}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
