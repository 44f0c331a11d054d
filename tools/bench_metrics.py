"""Compares what the measures of an evaluation cost, exact and in bounded memory, and how far apart they are.

    python tools/bench_metrics.py --run runs/NAME --split train

The run's best model scores a split of its dataset batch by batch, as an evaluation does; exact and bounded measures
take turns, and each turn's CPU seconds, reading included, on one thread of torch, are divided into scoring, taking in
the predictions, and computing the measures at the end. Shares are medians over the turns. The last line is JSON.
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
from collections.abc import Sequence
from typing import Any

import torch

from ssr_rec.data.reader import Reader
from ssr_rec.metrics.split_metrics import BoundedMetrics, ExactMetrics, FoldMetrics
from ssr_rec.model.ctr_model import CTRModel
from ssr_rec.runs.provenance import hardware
from ssr_rec.serving.trained_model import restore_model


def evaluation(model: CTRModel, reader: Reader, metrics: FoldMetrics) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluate once and return CPU seconds ``in_all``, ``taking_in`` and ``computing``, and the measures."""
    # Not wall time: small operations wait for the reader's thread, which works meanwhile.
    start, taking_in = time.process_time(), 0.0
    with torch.no_grad():
        for batch in reader.epoch(0):
            logits = model(*batch.inputs)
            before = time.thread_time()
            metrics.update(logits, batch.labels, batch.group_ids)
            taking_in += time.thread_time() - before
    before = time.thread_time()
    tasks = metrics.compute()
    computing = time.thread_time() - before
    assert tasks is not None
    return {"in_all": time.process_time() - start, "taking_in": taking_in, "computing": computing}, tasks


def differences(exact: dict[str, Any], bounded: dict[str, Any]) -> dict[str, Any]:
    """Return, per task, the bounded measure less the exact one beside its bound, and the sampling of GAUC."""
    found: dict[str, Any] = {}
    for task, mine in bounded.items():
        theirs = exact[task]
        found[task] = {f"{key}_off": mine[key] - theirs[key] for key in ("auc", "gauc", "logloss") if key in mine}
        found[task] |= {key: mine[key] for key in mine if key.endswith(("_bound", "_share", "_groups"))}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder, whose best weights score")
    parser.add_argument("--data", help="prepared dataset; default: where the run's config says")
    parser.add_argument("--split", default="test", help="train for more rows")
    parser.add_argument("--gauc-rows", type=int, default=2**22, help="rows that the bounded measures keep for GAUC")
    parser.add_argument("--turns", type=int, default=5, help="evaluations of each, after one that does not count")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        restored = restore_model(chosen.run, chosen.data)
        schema, batch_size = restored.schema, restored.config.train.eval_batch_size
        reader = Reader(restored.data, schema, chosen.split, batch_size, num_lanes=1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds: dict[str, list[dict[str, float]]] = {"exact": [], "bounded": []}
    measures: dict[str, Any] = {}
    for turn in range(chosen.turns + 1):
        for mode in seconds:
            labels = schema.labels
            metrics = ExactMetrics(labels) if mode == "exact" else BoundedMetrics(labels, chosen.gauc_rows)
            times, measures[mode] = evaluation(restored.model, reader, metrics)
            if turn:
                seconds[mode].append(times)
                print(f"turn {turn}, {mode}: " + ", ".join(f"{k} {v:.3f} s" for k, v in times.items()), flush=True)
    figures: dict[str, Any] = {"rows": reader.num_rows, "tasks": len(schema.labels), "batch_size": batch_size}
    for mode, turns in seconds.items():
        figures[mode] = {
            f"{part}_share": statistics.median(times[part] / times["in_all"] for times in turns)
            for part in ("taking_in", "computing")
        }
        figures[mode]["in_all_cpu_s"] = statistics.median(times["in_all"] for times in turns)
    figures["bounded_less_exact"] = differences(measures["exact"], measures["bounded"])
    print(json.dumps({**figures, "hardware": hardware()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
