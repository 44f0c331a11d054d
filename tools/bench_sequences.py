"""Measures what a sequence encoder costs in a training step of tables and a Dense MLP, and against its own arithmetic.

    python tools/bench_sequences.py
    python tools/bench_sequences.py --encoders din "transformer:num_heads=2,output=mean" --event-columns 2

The step without a sequence: ``--fields`` single-valued features and the candidate item, whose tables FBGEMM updates in
the backward pass (row-wise Adagrad), a Dense MLP, one logit, the backward pass, Adam on what is dense. The steps with a
sequence: the candidate and a history are read one by one from tables that they share, an encoder makes more fields.
Forward and backward of the encoder alone are timed as well. All steps take turns, and a ratio is the median of those of
single turns. FLOPs are ``SequenceEncoder.flops`` of these lengths, three times for forward and backward. The last line
is JSON.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.heap import keep_freed_memory
from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import yaml
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.settings import first_problem
from ssr_rec.over_archs.mlp import MLP
from ssr_rec.over_archs.settings import MLPConfig
from ssr_rec.runs.provenance import git_commit, hardware, versions
from ssr_rec.runs.table import markdown_table
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.choice import EncoderConfig
from ssr_rec.sequences.registry import build_encoder
from ssr_rec.train import quiet

ENCODERS = ["pool", "target_attention", "din", "din:activation=dice", "transformer", "hstu"]
Step = Callable[[], object]


def draw_lengths(rows: int, mean: float, most: int) -> Tensor:
    """Draw lengths (B,) from 0 to ``most``, geometric, many short and some cut off, with about this mean."""
    low, high = 1e-6, 1.0
    steps = torch.arange(1, most + 1, dtype=torch.float64)
    for _ in range(60):
        stop = (low + high) / 2
        low, high = (stop, high) if ((1 - stop) ** steps).sum() > mean else (low, stop)
    uniform = (torch.arange(rows) + 0.5) / rows
    lengths = (uniform.double().log() / torch.tensor(1 - stop).double().log()).long().clamp_max(most)
    return lengths[torch.randperm(rows)]


def tables(rows: int, dims: list[int], pooled: bool) -> nn.Module:
    """Make tables that their backward pass updates; un-pooled ones give a vector an id."""
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for dim in dims],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        pooling_mode=PoolingMode.SUM if pooled else PoolingMode.NONE,
    )


class Bench:
    """Holds one batch, and makes the steps on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.options, rows = options, options.batch
        self.lengths = draw_lengths(rows, options.mean_length, options.max_length)
        self.num_events = int(self.lengths.sum())
        self.ids = torch.randint(options.rows, (options.fields * rows,))
        # A column's ids: those of the histories, then those of the candidates.
        self.item_ids = torch.randint(options.rows, (options.event_columns, self.num_events + rows))
        self.ages = (10 ** (7 * torch.rand(self.num_events))).long()
        self.labels = (torch.rand(rows) < 0.3).float()

    def without(self) -> Step:
        """Make the step whose candidate is one more single-valued feature, or several, and has no history."""
        options, rows = self.options, self.options.batch
        count = options.fields + options.event_columns
        lookup = tables(options.rows, [options.dim] * count, pooled=True)
        ids = torch.cat([self.ids, self.item_ids[:, self.num_events :].flatten()])
        offsets = torch.arange(count * rows + 1)
        return self._train(count, [], lambda: lookup(ids, offsets))

    def with_encoder(self, encoder: SequenceEncoder) -> Step:
        """Make the step whose candidate and history share tables."""
        options, rows, columns = self.options, self.options.batch, self.options.event_columns
        lookup = tables(options.rows, [options.dim] * options.fields, pooled=True)
        shared = tables(options.rows, [options.dim] * columns, pooled=options.event_tables == "bags")
        offsets, ends = torch.arange(options.fields * rows + 1), torch.arange(self.item_ids.numel() + 1)

        def forward() -> Tensor:
            read = shared(self.item_ids.flatten(), ends)
            if options.event_tables == "unpooled":
                read = read.view(columns, -1, options.dim).transpose(0, 1).flatten(1)
            events, target = read.split([self.num_events, rows])
            return torch.cat([lookup(self.ids, offsets), target, encoder(events, self.lengths, target, self.ages)], 1)

        return self._train(options.fields + columns + encoder.out_fields, [encoder], forward)

    def alone(self, encoder: SequenceEncoder) -> Step:
        """Make forward and backward of the encoder, on events that are there."""
        width = encoder.event_dim
        events = torch.randn(self.num_events, width, requires_grad=True)
        target = torch.randn(self.options.batch, width, requires_grad=True)
        leaves = [events, target, *encoder.parameters()]
        upstream = torch.randn(self.options.batch, encoder.out_fields * self.options.dim)

        def step() -> object:
            y = encoder(events, self.lengths, target, self.ages)
            return torch.autograd.grad(y, leaves, upstream, allow_unused=True)

        return step

    def flops(self, encoder: SequenceEncoder) -> int:
        """Count forward and backward of the batch."""
        return 3 * sum(encoder.flops(int(n)).total for n in self.lengths)

    def _train(self, fields: int, modules: list[nn.Module], forward: Callable[[], Tensor]) -> Step:
        over_arch = MLP(fields, self.options.dim, 1, MLPConfig(hidden=self.options.hidden))
        dense = nn.ModuleList([over_arch, nn.Linear(over_arch.out_features, 1), *modules])
        optimizer = torch.optim.Adam(dense.parameters())

        def step() -> None:
            logits = dense[1](over_arch(forward())).squeeze(1)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, self.labels).backward()
            optimizer.step()

        return step


def take_turns(steps: Sequence[Step], turns: int, warmup: int) -> list[list[float]]:
    """Return seconds of each step, turn by turn, the order turning too."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(warmup + turns):
        for i in range(len(steps)):
            at = (i + turn) % len(steps)
            begun = time.perf_counter()
            steps[at]()
            if turn >= warmup:
                seconds[at].append(time.perf_counter() - begun)
    return seconds


def parse_encoder(text: str) -> Any:
    """Read ``name:key=value,...``, whose values are YAML.

    Raises:
        UserError: no such encoder or key.
    """
    name, _, rest = text.partition(":")
    values = yaml.safe_load("{" + rest.replace("=", ": ") + "}")
    try:
        return TypeAdapter(EncoderConfig).validate_python({"name": name, **values})
    except ValidationError as error:
        raise UserError(f"--encoders {text}: {first_problem(error)}") from None


def measure(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record an encoder; the first is of the step without."""
    encoders = []
    for text in options.encoders:
        width = options.event_columns * options.dim
        encoders.append(build_encoder(width, width, options.dim, options.max_length, parse_encoder(text)))
    steps = [bench.without()]
    for encoder in encoders:
        steps += [bench.with_encoder(encoder), bench.alone(encoder)]
    without, *others = take_turns(steps, options.turns, options.warmup)
    records: list[dict[str, Any]] = [{"encoder": None, "step_s": statistics.median(without)}]
    for text, encoder, step, alone in zip(options.encoders, encoders, others[::2], others[1::2], strict=True):
        flops, seconds = bench.flops(encoder), statistics.median(alone)
        records.append(
            {
                "encoder": text,
                "step_s": statistics.median(step),
                "step_ratio": statistics.median(a / b for a, b in zip(step, without, strict=True)),
                "alone_s": seconds,
                "flops": flops,
                "flops_per_s": flops / seconds,
                "parameters": encoder.num_parameters,
                "out_fields": encoder.out_fields,
            }
        )
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS, metavar="SPEC", help="name:key=value,...")
    parser.add_argument("--batch", type=int, default=1024, help="rows")
    parser.add_argument("--dim", type=int, default=16, help="dims of a column and of a field")
    parser.add_argument("--max-length", type=int, default=50, help="most events of a row")
    parser.add_argument("--mean-length", type=float, default=15.0, help="mean events of a row")
    parser.add_argument("--event-columns", type=int, default=1, help="columns of an event and of the candidate")
    parser.add_argument(
        "--event-tables",
        choices=["bags", "unpooled"],
        default="bags",
        help="how FBGEMM reads events: bags of one id each, or its un-pooled mode, as EmbeddingCollection does",
    )
    parser.add_argument("--fields", type=int, default=25, help="single-valued features beside the candidate")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    parser.add_argument("--hidden", type=int, nargs="+", default=[320, 320, 320], help="widths of the Dense MLP")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--turns", type=int, default=31, help="timed turns")
    parser.add_argument("--warmup", type=int, default=5, help="turns before them, not timed")
    options = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    try:
        for key in ("batch", "dim", "max_length", "event_columns", "fields", "rows", "threads", "turns"):
            if getattr(options, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} {getattr(options, key)}: must be at least 1")
        if not 0 < options.mean_length < options.max_length:
            raise UserError(f"--mean-length {options.mean_length}: must be within 0 and --max-length")
        bench = Bench(options)
        records = measure(bench, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = []
    for record in records[1:]:
        line = [record["encoder"], f"{record['step_s'] * 1e3:.1f}", f"{record['step_ratio']:.2f}x"]
        line += [f"{record['alone_s'] * 1e3:.2f}", f"{record['flops'] / 1e6:.0f}"]
        lines.append([*line, f"{record['flops_per_s'] / 1e9:.1f}"])
    mean = bench.num_events / options.batch
    print(f"step without: {records[0]['step_s'] * 1e3:.1f} ms; {bench.num_events} events, {mean:.1f} a row\n")
    print(markdown_table(["encoder", "step, ms", "against without", "alone, ms", "MFLOP", "GFLOP/s"], lines))
    own = {"settings": vars(options), "events": bench.num_events, "commit": git_commit()}
    print(json.dumps({"records": records, **own, "hardware": hardware(), "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
