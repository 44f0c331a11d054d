"""Runs one stage of bench_pipeline.py in a process of its own: ``python tools/pipeline_stages.py STAGE OPTIONS``.

OPTIONS are JSON. The last line is JSON: ``rows``, ``seconds`` and ``cpu_seconds`` of the work without imports, what
else the stage measured, and ``peak_mb``, the most memory that the process had, libraries included.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from process_memory import resident

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.engines import EngineSettings

# What only some stages use is imported there: it would count as memory of all of them.
if TYPE_CHECKING:
    from ssr_rec.data.schema import Schema

OVER_ARCH = {"name": "mlp", "hidden": [320, 320, 320]}
NUM_NUMERIC = 13
FOLD_ROWS = 1_024
"""Of validation and test each: enough for every rank."""


def peak_mb(process: int | str = "self") -> float:
    """Return the most resident memory of a process so far, in 10^6 bytes; 0 where there is none such."""
    return resident(process)["peak"] / 1e6


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Return the rows that ``work`` says it did, and its time without the imports before it."""
    wall, cpu = time.perf_counter(), time.process_time()
    rows = work()
    return {"rows": rows, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def draw(rows: int, output: str, ids: int) -> dict[str, Any]:
    """Draw a synthetic log of 39 single-valued features and a list; users and items have ``ids`` ids each."""
    from ssr_rec.data.synthetic.config import SyntheticConfig
    from ssr_rec.data.synthetic.write import write_synthetic

    config = SyntheticConfig(train_rows=rows, validation_rows=FOLD_ROWS, test_rows=FOLD_ROWS, users=ids, items=ids)
    return timed(lambda: write_synthetic(config, Path(output)).splits["train"].num_rows)


def prepare_drawn(drawn: str, output: str, memory_limit: str) -> dict[str, Any]:
    """Prepare the drawn log, taken for a raw one: 26 categorical columns, 13 numbers, one list."""
    from ssr_rec.data.preparation.prepare import prepare
    from ssr_rec.data.preparation.spec import make_spec
    from ssr_rec.data.schema import Schema

    schema = Schema.read(drawn)
    # Those of few values last: an id of a small table makes a plausible number.
    by_size = sorted((f for f in schema.features if f.kind != "list"), key=lambda f: -f.num_embeddings)
    singles = [f.name for f in by_size]
    spec = make_spec(
        {
            "name": "drawn",
            "labels": schema.labels,
            "categorical": singles[:-NUM_NUMERIC],
            "numeric": singles[-NUM_NUMERIC:],
            "lists": {f.name: {"max_length": f.max_length} for f in schema.features if f.kind == "list"},
            "group_id": "__group_id__",
            "split": {"type": "random", "ratios": [0.98, 0.01, 0.01]},
        },
        "drawn",
    )
    return timed(lambda: _rows(prepare([f"{drawn}/train"], Path(output), spec, settings=EngineSettings(memory_limit))))


def prepare_log(inputs: list[str], output: str, memory_limit: str, preset: str, spec: str | None) -> dict[str, Any]:
    """Prepare a raw log by a preset, or by the spec in a file."""
    from ssr_rec.data.preparation.prepare import prepare
    from ssr_rec.data.preparation.presets import PRESETS
    from ssr_rec.data.preparation.sources import read_table
    from ssr_rec.data.preparation.spec import read_spec

    read, chosen = (read_table, read_spec(Path(spec))) if spec else (PRESETS[preset].read, PRESETS[preset].spec)
    return timed(
        lambda: _rows(
            prepare(inputs, Path(output), chosen, read=read, settings=EngineSettings(memory_limit), preset=preset)
        )
    )


def _rows(schema: Schema) -> int:
    return sum(split.num_rows for split in schema.splits.values())


def read(data: str, batch_size: int) -> dict[str, Any]:
    """Make one shuffled pass of the reader over the training split on one rank."""
    from ssr_rec.data.schema import Schema

    return timed(partial(one_pass, data, Schema.read(data), batch_size, 0))


def one_pass(data: str, schema: Schema, batch_size: int, epoch: int) -> int:
    """Return the rows of a shuffled pass over the training split, by a reader opened for it."""
    from ssr_rec.data.reader import Reader

    reader = Reader(Path(data), schema, "train", batch_size, seed=0)
    return sum(len(batch.labels) for batch in reader.batches(epoch, 0))


def consume(data: str, batch_size: int, turns: int, steps: int) -> dict[str, Any]:
    """Run the reader alone and a bare Dense MLP 3x320 in turns, on the 39 single-valued features and one thread.

    ``reader`` and ``model`` are medians of rows per CPU second.
    """
    import torch
    from bench_training import bare_loop

    from ssr_rec.common.logs import quiet
    from ssr_rec.config.run import resolve
    from ssr_rec.data.schema import Schema
    from ssr_rec.training.setup import start_process_group

    quiet()
    torch.set_num_threads(1)
    schema = Schema.read(data)
    schema = schema.select([f.name for f in schema.features if f.kind != "list"], None)
    config = resolve(
        {"device": "cpu", "data": {"path": data}, "over_arch": OVER_ARCH, "train": {"batch_size": batch_size}},
        "bench_pipeline",
    )
    model = bare_loop(config, schema, start_process_group(config.device))

    def some_steps(turn: int) -> int:
        model(steps)
        return steps * batch_size

    speeds: dict[str, list[float]] = {"reader": [], "model": []}
    jobs: dict[str, Callable[[int], int]] = {
        "reader": partial(one_pass, data, schema, batch_size),
        "model": some_steps,
    }
    total: dict[str, float] = {"rows": 0, "seconds": 0, "cpu_seconds": 0}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            done = timed(partial(job, turn))
            total = {key: total[key] + value for key, value in done.items()}
            if turn:
                speeds[name].append(done["rows"] / done["cpu_seconds"])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        **total,
        "features": len(schema.features),
        "embedding_dim": config.embeddings.dim,
        **{name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(v)), round(max(v))] for name, v in speeds.items()},
        "ratio": round(medians["reader"] / medians["model"], 1),
    }


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "draw": draw,
    "prepare_drawn": prepare_drawn,
    "prepare_log": prepare_log,
    "read": read,
    "consume": consume,
}


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in STAGES:
        print(f"usage: pipeline_stages.py {{{','.join(STAGES)}}} OPTIONS, as bench_pipeline.py calls it")
        return 0 if sys.argv[1:] == ["-h"] else 2
    try:
        figures = STAGES[sys.argv[1]](**json.loads(sys.argv[2]))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({**figures, "peak_mb": round(peak_mb())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
