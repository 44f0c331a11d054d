"""Measures what saving costs training: turns with one checkpoint in each against turns without, side by side.

    python tools/bench_checkpoints.py --data data/kuairand --config configs/kuairand_mlp.yaml --steps 400

A turn with a checkpoint starts it at its first step and waits at its end for what is left of the writing, so all of
the cost is inside. The extra seconds of a turn, spread over ``--every`` seconds of training, are the share of the
throughput that a checkpoint every so many seconds costs. Both in the background and, for comparison, in the foreground.
The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_training import (  # it also checks the stack, before torchrec is imported
    make_trainer,
    open_data,
    stepper,
    turns_parser,
)

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.config.checkpointing import CheckpointConfig
from ssr_rec.runs.provenance import hardware

MODES = ("none", "background", "foreground")


def main() -> int:
    parser = turns_parser(str(__doc__), steps=400, turns=7)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints")
    arguments, overrides = parser.parse_known_args()
    quiet()
    try:
        config, schema, device, reader = open_data(arguments, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    held: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, schema, device, reader, Path(folder))
        run = stepper(trainer, reader)
        for turn in range(arguments.turns + 1):
            for mode in MODES:
                trainer.checkpoints.config = CheckpointConfig(
                    every_minutes=None, keep=1, asynchronous=mode == "background"
                )
                start = time.perf_counter()
                if mode != "none" and turn:  # dense optimizers have no state before the first step
                    trainer.checkpoints.save_training(trainer.state_dict())
                saved = time.perf_counter()
                run(arguments.steps)
                trainer.checkpoints.finish()
                if turn:
                    seconds[mode].append(time.perf_counter() - start)
                    held[mode].append(saved - start)
            print(f"turn {turn}: " + "  ".join(f"{m} {s[-1]:.2f} s" for m, s in seconds.items() if s), flush=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    figures: dict[str, Any] = {
        "dataset": schema.name,
        "over_arch": config.over_arch.label,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "checkpoint_mib": round(size / 2**20, 1),
        "turn_s": {mode: round(value, 3) for mode, value in medians.items()},
        "spread_s": {mode: [round(min(v), 3), round(max(v), 3)] for mode, v in seconds.items()},
        "training_waits_s": {mode: round(statistics.median(held[mode]), 3) for mode in MODES[1:]},
        "share_of_throughput": {
            mode: round((medians[mode] - medians["none"]) / arguments.every, 4) for mode in MODES[1:]
        },
        "every_s": arguments.every,
        "hardware": hardware(),
    }
    for mode, share in figures["share_of_throughput"].items():
        print(f"a checkpoint every {arguments.every:g} s in the {mode}: {100 * share:.2f} % of the throughput")
    print(json.dumps(figures))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
