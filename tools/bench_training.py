"""Measures training throughput of the whole job against a bare TorchRec loop, side by side in one run.

    python tools/bench_training.py --data data/ml1m_half --config configs/ml1m_half_mlp.yaml

The bare loop has the same tables and optimizers in the backward pass, the same over-arch and batch size, random ids
that are already in memory, and nothing else: no reader, no pipeline, no metrics, no logging. The two take turns;
the ratio is that of their median samples/s. With --profile instead: where the time of a step goes, for each of six
over-archs or those named, by torch's profiler (tools/step_profile.py). The last line is JSON.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.checkpointing.manager import CheckpointManager
from ssr_rec.common.logs import quiet
from ssr_rec.config.checkpointing import CheckpointConfig
from ssr_rec.config.run import RunConfig, load_config
from ssr_rec.data.batch import Batch
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.runs.provenance import hardware, versions
from ssr_rec.training.datasets import Rows, open_reader
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.setup import start_process_group
from ssr_rec.training.trainer import Trainer

NEVER = CheckpointConfig(every_steps=None, every_minutes=None)
Job = Callable[[int], None]
"""Trains for a number of steps and may be called again."""


def make_trainer(config: RunConfig, schema: Schema, device: torch.device, reader: Reader, folder: Path) -> Trainer:
    """Return the trainer of ssr_rec/train.py on one rank; checkpoints, when asked for, go to ``folder``."""
    model = build_model(config, schema, device, world_size=1, local_world_size=1)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    model.train()
    rows = Rows(reader, lambda epoch: (reader, {}), reader, lambda split, to_train: reader)
    return Trainer(config, rows, model, optimizer, CheckpointManager(config.checkpoint, folder))


def whole_job(config: RunConfig, schema: Schema, device: torch.device, reader: Reader) -> Job:
    """Return the job of ssr_rec/train.py between two evaluations: reader, pipeline, running AUC, progress rows."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config.model_copy(update={"checkpoint": NEVER}), schema, device, reader, Path(folder))
    return stepper(trainer, reader)


def stepper(trainer: Trainer, reader: Reader) -> Job:
    """Return a job that trains so many further steps, across epochs."""
    epochs = [(0, reader.epoch(0))]

    def run(steps: int) -> None:
        last = trainer.fitted.steps + steps
        while trainer.fitted.steps < last:
            epoch, step = divmod(trainer.fitted.steps, reader.steps_per_epoch)
            if epoch != epochs[-1][0]:
                epochs.append((epoch, reader.epoch(epoch)))
            until = min(last, trainer.fitted.steps - step + reader.steps_per_epoch)
            for _ in trainer.train_segment(epochs[-1][1], epoch, until):
                pass

    return run


def bare_loop(config: RunConfig, schema: Schema, device: torch.device) -> Job:
    """Return a job that trains the same sharded model by the same optimizers on 64 random batches in memory."""
    model = build_model(config, schema, device, world_size=1, local_world_size=1)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    batches = [random_batch(schema, config.train.batch_size, seed).to(device) for seed in range(64)]
    return bare_job(model, optimizer, batches)


def bare_job(model: nn.Module, optimizer: CombinedOptimizer, batches: Sequence[Batch]) -> Job:
    """Forward, backward and update over ``batches`` in turn."""
    model.train()

    def run(steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            loss, _ = model(batches[step % len(batches)])
            loss.backward()
            optimizer.step()

    return run


def random_batch(schema: Schema, rows: int, seed: int) -> Batch:
    """Uniform ids; lists of half their longest length on average."""
    generator = torch.Generator().manual_seed(seed)
    lengths, values = [], []
    for feature in schema.features:
        ones = torch.ones(rows, dtype=torch.int64)
        longest = feature.max_length
        counts = ones if longest is None else torch.randint(0, longest + 1, (rows,), generator=generator)
        lengths.append(counts)
        values.append(torch.randint(0, feature.num_embeddings, (int(counts.sum()),), generator=generator))
    sparse = KeyedJaggedTensor(schema.feature_names, torch.cat(values), lengths=torch.cat(lengths))
    labels = torch.randint(0, 2, (rows, len(schema.labels)), generator=generator).float()
    return Batch(sparse, labels, None, rows)


def turns_parser(description: str, steps: int, turns: int) -> argparse.ArgumentParser:
    """Return the arguments of a benchmark whose jobs take turns of training on one dataset."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--config", help="run config; default: SSR-S")
    parser.add_argument("--steps", type=int, default=steps, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=turns, help="turns of each, after one that does not count")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; default: all cores")
    return parser


def open_data(
    arguments: argparse.Namespace, overrides: Sequence[str]
) -> tuple[RunConfig, Schema, torch.device, Reader]:
    """Return what those arguments name, opened on one rank.

    Raises:
        ValueError: a config or dataset that cannot be.
    """
    config = load_config(arguments.config, [*overrides, f"--data.path={arguments.data}"])
    schema = Schema.read(arguments.data).select(config.data.features, config.data.labels)
    device = start_process_group(config.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    reader = open_reader(config, Path(arguments.data), schema, "train", rank=0, world_size=1)
    return config, schema, device, reader


PROFILED = (
    "mlp:hidden=[320,320,320]",
    "deepfm",
    "dcn_v2",
    "ssr:filter=static,num_views=8,view_dim=128",
    "ssr:filter=dynamic,num_views=4,view_dim=128",
    "rankmixer",
)


def profile(
    config: RunConfig, schema: Schema, device: torch.device, reader: Reader, arguments: argparse.Namespace
) -> int:
    """Print where a step of each over-arch goes; returns the exit status."""
    # Imported here: other tools use this file's jobs alone.
    from over_arch_sizes import parse_over_arch
    from step_profile import product_microseconds, product_rate, profile_steps, profile_table

    rate = product_rate(config.train.batch_size, 320)
    found = {}
    for spec in arguments.profile or PROFILED:
        one = config.model_copy(update={"over_arch": parse_over_arch(spec), "checkpoint": NEVER})
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(one, schema, device, reader, Path(folder))
            measured = profile_steps(stepper(trainer, reader), arguments.steps)
        alone = product_microseconds(trainer.over_arch, config.train.batch_size, rate)
        found[one.over_arch.label] = {**measured, "products_alone": alone}
        print(f"{one.over_arch.label}: {measured['step']:,.0f} us a step", file=sys.stderr, flush=True)
    print(profile_table(found))
    about = {"dataset": schema.name, "batch_size": config.train.batch_size, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "product_gflops": rate / 1e9, "found": found, "hardware": hardware()}))
    return 0


def main(given: Sequence[str] | None = None) -> int:
    parser = turns_parser(str(__doc__), steps=200, turns=5)
    parser.add_argument(
        "--profile", nargs="*", metavar="SPEC", help="where a step goes; over-archs as in bench_over_arch.py"
    )
    arguments, overrides = parser.parse_known_args(given)
    quiet()
    try:
        config, schema, device, reader = open_data(arguments, overrides)
        if arguments.profile is not None:
            return profile(config, schema, device, reader, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    jobs = {"ours": whole_job(config, schema, device, reader), "bare": bare_loop(config, schema, device)}
    speeds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(arguments.turns + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job(arguments.steps)
            speed = arguments.steps * config.train.batch_size / (time.perf_counter() - start)
            if turn:
                speeds[name].append(speed)
        print(f"turn {turn}: " + "  ".join(f"{n} {s[-1]:,.0f} samples/s" for n, s in speeds.items() if s), flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    figures = {
        "over_arch": config.over_arch.label,
        "dataset": schema.name,
        "batch_size": config.train.batch_size,
        "threads": torch.get_num_threads(),
        "samples_per_s": {name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(v)), round(max(v))] for name, v in speeds.items()},
        "ratio": round(medians["ours"] / medians["bare"], 3),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
