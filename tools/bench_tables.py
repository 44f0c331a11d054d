"""Compares FBGEMM's lookups and the fused updates of the tables on a CPU with what the memory allows.

    OMP_NUM_THREADS=1 python tools/bench_tables.py --rows 1000 1000000

Single-valued ids of so many tables, Zipf's by ``--exponent``, drawn anew for each turn; all forms take turns. Per id of
the batch: a *lookup* beside a gather of the same rows by ``index_select``, and an *update*, the backward pass, beside a
gather and a write of the distinct rows and their optimizer's state. Medians over the turns. The last line is JSON.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from ssr_rec.embeddings.cpu_bags import AdamBags, RowWiseAdagradBags
from ssr_rec.runs.provenance import hardware

KINDS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
}
OURS = {"our rowwise_adagrad": RowWiseAdagradBags, "our lazy_adam": AdamBags}
STATES = {"sgd": 0, "adagrad": 1, "our lazy_adam": 2}
"""Optimizer -> its state, in rows of the table; row-wise Adagrad's is one number a row and counts as none."""


def build_tables(optimizer: str, rows: int, chosen: argparse.Namespace) -> SplitTableBatchedEmbeddingBagsCodegen:
    specs = [(rows, chosen.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * chosen.tables
    settings: dict[str, Any] = {"pooling_mode": PoolingMode.SUM, "learning_rate": 1e-3}
    if optimizer in OURS:
        settings["optimizer"] = EmbOptimType.EXACT_ROWWISE_ADAGRAD
        return OURS[optimizer](specs, **settings)
    return SplitTableBatchedEmbeddingBagsCodegen(specs, optimizer=KINDS[optimizer], **settings)


def draw_ids(rows: int, chosen: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Return ids (tables x batch,), the k-th most frequent with a share of k ** -exponent, at shuffled rows."""
    shares = torch.arange(1, rows + 1, dtype=torch.float64).pow(-chosen.exponent).cumsum(0)
    at = torch.rand(chosen.tables * chosen.batch, generator=generator, dtype=torch.float64) * shares[-1]
    return torch.randperm(rows, generator=generator)[torch.searchsorted(shares, at).clamp_(max=rows - 1)]


def there_and_back(held: Sequence[Tensor], rows: Tensor) -> None:
    for one in held:
        one.index_copy_(0, rows, one.index_select(0, rows))


def measure(rows: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return ``distinct``, the share of the ids that are, and what each form takes, in ns an id."""
    generator = torch.Generator().manual_seed(0)
    tables, batch, dim = chosen.tables, chosen.batch, chosen.dim
    every = {optimizer: build_tables(optimizer, rows, chosen) for optimizer in (*KINDS, *OURS)}
    held = [torch.rand(tables * rows, dim) for _ in range(1 + max(STATES.values()))]
    offsets, starts = torch.arange(tables * batch + 1), torch.arange(tables).repeat_interleave(batch) * rows
    out, grad = torch.empty(tables * batch, dim), torch.randn(batch, tables * dim)
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        work()
        found.setdefault(name, []).append((time.perf_counter() - started) / len(starts) * 1e9)

    distinct = 0.0
    for _ in range(chosen.turns + 1):
        ids = draw_ids(rows, chosen, generator)
        at = ids + starts
        once = at.unique()
        distinct = len(once) / len(at)
        timed("gather", partial(torch.index_select, held[0], 0, at, out=out))
        for kind in (torch.int64, torch.int32):
            with torch.no_grad():
                timed(f"lookup {str(kind)[6:]}", partial(every["sgd"], ids.to(kind), offsets.to(kind)))
        for name, module in every.items():
            timed(f"update {name}", partial(module(ids, offsets).backward, grad))
        for states in STATES.values():
            timed(f"write {states}", partial(there_and_back, held[: states + 1], once))
    # The first turn warms up.
    return {"rows": rows, "distinct": distinct, "ns": {name: statistics.median(ns[1:]) for name, ns in found.items()}}


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, a column a size of the tables."""
    lines = [
        "| ns an id | " + " | ".join(f"{case['rows']:,} rows, {case['distinct']:.0%} distinct" for case in cases) + " |"
    ]
    lines.append("|---|" + "--:|" * len(cases))
    beside = {"lookup int64": "gather", "lookup int32": "gather"}
    beside |= {f"update {whose}rowwise_adagrad": "write 0" for whose in ("", "our ")}
    beside |= {f"update {optimizer}": f"write {states}" for optimizer, states in STATES.items()}
    for name, floor in beside.items():
        cells = [f"{case['ns'][name]:.0f}, memory {case['ns'][floor]:.0f}" for case in cases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000], help="of each table")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--dim", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--batch", type=int, default=2_048, help="rows of a batch")
    parser.add_argument("--exponent", type=float, default=1.05, help="of Zipf's law; 0: every id as often")
    parser.add_argument("--turns", type=int, default=15, help="of all forms, after one that does not count")
    chosen = parser.parse_args(arguments)
    try:
        for key in ("rows", "tables", "dim", "batch", "turns"):
            given = getattr(chosen, key)
            if min(given if key == "rows" else [given]) < 1 or (key == "dim" and given % 4):
                raise UserError(f"--{key}={given}: it must be 1 or more, and --dim a multiple of 4")
        cases = [measure(rows, chosen) for rows in chosen.rows]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(cases))
    print(json.dumps({"cases": cases, "threads": torch.get_num_threads(), "hardware": hardware()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
