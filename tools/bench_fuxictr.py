"""Measures training throughput, and test AUC, of our DeepFM, DCN v2 and DIN against FuxiCTR's, side by side in one run.

    python tools/bench_fuxictr.py --data data/ml1m_half --fuxictr-python FUXICTR_VENV/bin/python --auc
    python tools/bench_fuxictr.py --data data/ml1m_half_sequences --models din --fuxictr-python ... --auc --seeds 3

FuxiCTR is in a venv of its own (``pip install fuxictr==2.3.10``), where tools/fuxictr_child.py trains its model with
its own loader and loop. Both train on the same rows and ids, the dataset's single-valued features and one label (DIN:
also the first history of a vocabulary that one of them has), with the same sizes, Adam 1e-3 on everything and no
regularisation. They take turns on the same cores, one by default; the ratio is that of their median samples/s. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_training import Job, whole_job  # it also checks the stack, before torchrec is imported
from fuxictr_side import FuxiCTR, history_and_target, write_for_fuxictr

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.config.run import RunConfig, resolve
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.runs.provenance import hardware, versions
from ssr_rec.train import train
from ssr_rec.training.datasets import open_reader
from ssr_rec.training.setup import start_process_group

CHILD = Path(__file__).with_name("fuxictr_child.py")
DIM, BATCH_SIZE, LEARNING_RATE, HIDDEN, CROSS_LAYERS = 16, 1024, 1e-3, [320, 320, 320], 3
ATTENTION_HIDDEN = [64]
"""Of DIN's activation unit, with Dice and no softmax: what FuxiCTR's model zoo has by default."""
OVER_ARCHS: dict[str, dict[str, Any]] = {
    "deepfm": {"name": "deepfm", "hidden": HIDDEN},
    "dcn_v2": {"name": "dcn_v2", "num_cross_layers": CROSS_LAYERS, "rank": None, "hidden": HIDDEN},
    "din": {"name": "mlp", "hidden": HIDDEN},
}


def our_config(data: Path, schema: Schema, model: str, runs: Path, bf16: bool = False) -> RunConfig:
    """Our side of the comparison, for throughput and, with epochs, for AUC: on CPU Adam is dense on whole tables."""
    values = {
        "device": "cpu",
        "runs": str(runs),
        "data": {"path": str(data), "features": schema.feature_names, "labels": schema.labels},
        "embeddings": {"dim": DIM, "optimizer": "adam", "learning_rate": LEARNING_RATE, "init_scale": 0.01},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "over_arch": dict(OVER_ARCHS[model]),
        "train": {"batch_size": BATCH_SIZE, "eval_every": None, "patience": 1, "monitor": "auc", "bf16": bf16},
    }
    if model == "din":
        sequence, _, target = history_and_target(schema)
        encoder = {"name": "din", "hidden": ATTENTION_HIDDEN, "activation": "dice"}
        values["sequences"] = {sequence: {"encoder": encoder, "target": [target]}}
    return resolve(values, "bench_fuxictr")


def narrowed(schema: Schema, model: str, label: str | None) -> Schema:
    """Return the schema of what is compared: single-valued features and one label, and for DIN one history.

    Raises:
        ValueError: the dataset has no such features, or not that label.
    """
    features = [feature.name for feature in schema.features if feature.kind != "list"]
    if not features:
        raise UserError(f"dataset {schema.name!r}: no single-valued feature, and only those are compared")
    if model == "din":
        features.append(history_and_target(schema)[1])
    return schema.select(features, [label or schema.labels[0]])


def take_turns(ours: Job, fuxictr: FuxiCTR, steps: int, turns: int) -> dict[str, list[float]]:
    """Samples/s of each turn of each, after a turn that does not count."""
    speeds: dict[str, list[float]] = {"ours": [], "fuxictr": []}
    for turn in range(turns + 1):
        start = time.perf_counter()
        ours(steps)
        seconds = {"ours": time.perf_counter() - start, "fuxictr": fuxictr.ask(steps=steps)["seconds"]}
        said = {name: steps * BATCH_SIZE / value for name, value in seconds.items()}
        print(f"turn {turn}: " + "  ".join(f"{n} {s:,.0f} samples/s" for n, s in said.items()), flush=True)
        for name in speeds if turn else ():
            speeds[name].append(said[name])
    return speeds


def compare(model: str, data: Path, schema: Schema, fuxictr: FuxiCTR, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model."""
    with tempfile.TemporaryDirectory() as runs:
        config = our_config(data, schema, model, Path(runs), options.bf16)
        device = start_process_group(config.device)
        reader = open_reader(config, data, schema, "train", rank=0, world_size=1)
        speeds = take_turns(whole_job(config, schema, device, reader), fuxictr, options.steps, options.turns)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        built = build_model(config, schema, device, world_size=1, local_world_size=1)
        dense = sum(p.numel() for name, p in built.named_parameters() if ".embedding_bags." not in name)
        figures: dict[str, Any] = {
            "samples_per_s": {name: round(value) for name, value in medians.items()},
            "spread": {name: [round(min(v)), round(max(v))] for name, v in speeds.items()},
            "ratio": round(medians["ours"] / medians["fuxictr"], 3),
            "dense_parameters": {"ours": dense, "fuxictr": fuxictr.built["dense_parameters"]},
        }
        if options.auc:
            aucs: dict[str, list[float]] = {"ours": [], "fuxictr": []}
            for seed in range(options.seeds):
                training = config.train.model_copy(update={"epochs": options.auc})
                with contextlib.redirect_stdout(sys.stderr):  # its progress lines
                    report = train(config.model_copy(update={"seed": seed, "name": f"{seed}", "train": training}))
                aucs["ours"].append(round(report.test[schema.labels[0]]["auc"] or math.nan, 5))
                aucs["fuxictr"].append(round(fuxictr.ask(epochs=options.auc, seed=seed)["auc"], 5))
                print(f"seed {seed}: " + "  ".join(f"{n} test AUC {a[-1]:.5f}" for n, a in aucs.items()), flush=True)
            figures["test_auc"] = aucs
    print(f"{model}: ours {medians['ours']:,.0f}, FuxiCTR {medians['fuxictr']:,.0f}, ratio {figures['ratio']}")
    return figures


@contextlib.contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Keep this process, and those it starts, on so many cores and with so many torch threads; undone at the end.

    Raises:
        ValueError: there are not so many.
    """
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    if not 1 <= cores <= len(before):
        raise UserError(f"--cores {cores}: this machine has {len(before)} for us")
    os.sched_setaffinity(0, sorted(before)[-cores:])
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="prepared dataset")
    parser.add_argument("--fuxictr-python", required=True, help="the python of a venv with FuxiCTR")
    parser.add_argument("--models", nargs="+", choices=list(OVER_ARCHS), default=["deepfm", "dcn_v2"])
    parser.add_argument("--label", help="label to train; default: the dataset's first")
    parser.add_argument("--steps", type=int, default=150, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each, after one that does not count")
    parser.add_argument("--cores", type=int, default=1, help="cores and torch threads, the same for both")
    parser.add_argument(
        "--auc",
        type=int,
        nargs="?",
        const=10,
        default=0,
        metavar="EPOCHS",
        help="also train each with early stopping, at most so many epochs (10), and report test AUC",
    )
    parser.add_argument("--bf16", action="store_true", help="our over-arch in bfloat16; FuxiCTR has no such setting")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each for --auc")
    parser.add_argument("--fuxictr-loader", choices=["npz", "parquet"], default="npz", help="parquet: through Ray")
    parser.add_argument(
        "--fuxictr-workers",
        type=int,
        default=0,
        help="worker processes of its npz loader; on one core 0 is the fastest",
    )
    return parser


def main(arguments: Sequence[str] | None = None, child: Path = CHILD) -> int:
    options = _parser().parse_args(arguments)
    quiet()
    try:
        whole = Schema.read(options.data)
        settings: dict[str, Any] = {
            "dim": DIM, "hidden": HIDDEN, "num_cross_layers": CROSS_LAYERS, "attention_hidden": ATTENTION_HIDDEN,
            "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "threads": options.cores,
            "loader": options.fuxictr_loader, "workers": options.fuxictr_workers,
        }  # fmt: skip
        figures: dict[str, Any] = {}
        with pinned(options.cores), tempfile.TemporaryDirectory() as root:
            for model in options.models:
                schema, folder = narrowed(whole, model, options.label), Path(root) / model
                names: dict[str, Any] = {"features": schema.feature_names}
                if model == "din":
                    names |= dict(zip(("sequence", "history", "target"), history_and_target(schema), strict=True))
                write_for_fuxictr(options.data, schema, folder, settings | names)
                fuxictr = FuxiCTR(options.fuxictr_python, child, folder, model, options.cores)
                with contextlib.closing(fuxictr):
                    figures[model] = names | compare(model, options.data, schema, fuxictr, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(
        json.dumps(
            {
                "dataset": schema.name,
                "label": schema.labels[0],
                "settings": settings | {"our_bf16": options.bf16},
                "models": figures,
                "hardware": hardware(),
                "versions": {"ours": versions(), "fuxictr": fuxictr.built["versions"]},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
