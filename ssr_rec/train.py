"""Train one model: ``torchx run dist.ddp -j 2x8 ssr_rec/train.py --config C``, torchrun, or plain python.

Builds everything top to bottom, calls fit(), writes the report. Bad input ends with one line and exit code 2.
"""

from ssr_rec.stack import require_stack

# Before torchrec is imported: with a wrong stack that import itself fails, deep in C++.
require_stack()

import argparse
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.accumulation import Accumulation
from ssr_rec.begin import begin
from ssr_rec.config import RunConfig, dump_config, load_config
from ssr_rec.data.reader import Reader
from ssr_rec.data.synthetic import ensure_synthetic
from ssr_rec.days import first_inputs, open_rows, report_of_days
from ssr_rec.embeddings import build_tables, initialise_tables
from ssr_rec.evaluation import evaluate
from ssr_rec.managed import check_managed, managed_ids
from ssr_rec.metrics import RunningAUC
from ssr_rec.model import CTRModel, TrainTask
from ssr_rec.optim import Schedule, build_optimizer
from ssr_rec.over_archs import AutoFISConfig, OverArch, OverArchConfig
from ssr_rec.places import place
from ssr_rec.report import RunLog, build_report, capture_inputs, finish_report
from ssr_rec.restore import build_dense
from ssr_rec.resume import finished_report
from ssr_rec.saver import Saver
from ssr_rec.schema import Schema
from ssr_rec.sharding import build_topology, plan_sharding, shard
from ssr_rec.skipping import SkippingPipeline
from ssr_rec.snapshot import training_now, weights_now
from ssr_rec.trainer import PROGRESS_ROWS, Loop, TrainConfig, fit
from ssr_rec.warm_start import load_weights
from ssr_rec.watch import PREEMPTED, Preempted, StallWatch, stop_on_sigterm


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train one model on one click log; see README.md.", epilog="Any config key: --train.batch_size=512"
    )
    parser.add_argument("--config", help="YAML file, such as configs/smoke.yaml; default: SSR-S on the synthetic log")
    parser.add_argument("--print_config", action="store_true", help="show the resolved config and stop")
    known, overrides = parser.parse_known_args(arguments)
    quiet()
    try:
        config = load_config(known.config, overrides)
        if known.print_config:
            print(dump_config(config), end="")
            return 0
        train(config)
    except Preempted as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED
    except (RuntimeError, OSError) as error:
        if not (lost_peer(error) or isinstance(error, OSError)):
            raise
        print(f"error: {error}"[:500], file=sys.stderr)
        return 1
    except ValueError as error:
        if is_library_error(error):
            raise
        # Every rank meets the same bad config or dataset: one line per host is enough.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def train(config: RunConfig) -> dict[str, Any]:
    """Run ``config`` to its report; every rank calls it and gets the report.

    An over-arch that says after its training what to train next (AutoFIS) is a search: its run folder is named
    ``NAME-search``, and the run that follows has the name.

    Raises:
        ValueError: bad config or data; the message names the key or file and the fix.
    """
    if isinstance(config.over_arch, AutoFISConfig) and config.over_arch.pairs is None:
        search_name = f"{config.name}-search" if config.name else None
        search = config.model_copy(update={"name": search_name})
        done = finished_report(search.model_dump(mode="json"), config.over_arch.label)
        following = AutoFISConfig.model_validate(done["following"]) if done else train_stage(search)[1]
        config = config.model_copy(update={"over_arch": following})
    report, _ = train_stage(config)
    return report


def train_stage(config: RunConfig) -> tuple[dict[str, Any], OverArchConfig | None]:
    """One training to its report, and what the over-arch, as training left it, says to train next."""
    device = start_process_group(config.device)
    check_device(config.train, device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))

    log = RunLog(rank, world_size)
    folder = place(config.data.path) if config.data.path else draw_synthetic(config, log)
    schema = Schema.read(folder).select(config.data.features, config.data.labels)
    check_train_config(config.train, schema)

    def open_split(split: str, to_train: bool) -> Reader:
        return open_reader(config, folder, schema, split, rank, world_size, to_train)

    rows = open_rows(config, folder, schema, world_size, open_split)

    model = build_model(config, schema, device, world_size, local_world_size)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    accumulation = Accumulation(model, optimizer)
    accumulates = config.train.accumulate > 1
    pipeline = build_pipeline(model, accumulation if accumulates else optimizer, device, config.train)
    over_arch: OverArch = model.module.model.dense.over_arch
    running = RunningAUC(schema.labels, window=PROGRESS_ROWS)

    try:
        start = log.open(config, schema, over_arch, rows.train)
        saver = Saver(config.checkpoint, log.folder, log.progress.note)
        fitted, warm_started = begin(config, start, saver, log, model, optimizer, running, rows.train)
    except ValueError:
        log.discard()
        raise
    watch = StallWatch(config.train.stall_timeout_s)
    values = config.model_dump(mode="json")
    loop = Loop(
        pipeline=pipeline,
        model=model,
        schedule=Schedule(optimizer, config.optimizer.warmup_steps, fitted.steps_before),
        train=rows.train,
        validation=rows.validation,
        config=config.train,
        running=running,
        log=log,
        note=log.progress.note,
        saver=saver,
        weights=lambda: weights_now(model, fitted),
        state=lambda: training_now(model, optimizer, running, fitted, rows.train, values),
        beat=watch.beat,
        fitted=fitted,
    )
    if accumulates:
        loop.around = accumulation.batch
    try:
        with stop_on_sigterm() as loop.asked_to_stop:
            fit(loop)
        saver.finish()
        watch.beat("the test")
        following = over_arch.following_config()
        if rows.test is None:
            inputs = first_inputs(pipeline, model, over_arch, open_split(fitted.days[-1]["day"], False))
            ended = report_of_days(fitted.days)
        else:
            if following is None:  # a search is what it ended with: its best may come before it has pruned anything
                load_weights(model, saver.best_folder)
            with capture_inputs(over_arch) as inputs:
                test = evaluate(pipeline, model, rows.test, config.train, watch.beat)
            log(loop.row("test", fitted.best["epoch"], **test))
            ended = {"test": test["tasks"], "metrics": test["metrics"]}
    except ValueError:
        saver.finish()  # a checkpoint from before a bad step is still being written
        raise
    finally:
        watch.close()
    dense = model.module.model.dense
    report = build_report(config, rows.train, dense, fitted, ended["test"], inputs[0], world_size) | ended
    report |= {"following": following and following.model_dump(mode="json"), "warm_start": warm_started}
    report["failed_checkpoints"] = saver.failures
    finish_report(log, report)
    return report, following


def build_pipeline(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer | Accumulation,
    device: torch.device,
    config: TrainConfig,
) -> TrainPipelineSparseDist:
    if config.pipeline == "prefetch":
        return PrefetchTrainPipelineSparseDist(model, optimizer, device)
    if config.skip_bad_steps:
        return SkippingPipeline(model, optimizer, device, config.max_loss or math.inf)
    return TrainPipelineSparseDist(model, optimizer, device)


def start_process_group(device: str) -> torch.device:
    """Join the job's ranks (gloo on CPU, NCCL on CUDA), or be the only one when no launcher set RANK."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch finds no GPU here; use --device=cpu or auto")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return chosen


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Refuse what the device cannot do, and switch on TF32 where it is wanted.

    Raises:
        ValueError: names the key and the fix.
    """
    if config.pipeline == "prefetch":
        if device.type != "cuda":
            # Without CUDA streams TorchRec's prefetch_embeddings fetches nothing and the forward pass finds no input.
            raise ValueError(
                f"train.pipeline: prefetch needs CUDA streams and FBGEMM's row cache, and this is {device.type}; "
                "use sparse_dist"
            )
        if config.skip_bad_steps:
            raise ValueError(
                f"train.skip_bad_steps={config.skip_bad_steps} is not for train.pipeline: prefetch; use sparse_dist"
            )
    if config.tf32:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise ValueError("train.tf32: only NVIDIA GPUs from A100 (compute capability 8.0) on have TF32; remove it")
        torch.set_float32_matmul_precision("high")


def draw_synthetic(config: RunConfig, log: RunLog) -> Path:
    """The folder of the synthetic log, drawn by whoever comes first."""
    folder = ensure_synthetic(config.data.synthetic, Path(config.data.synthetic_root), log.drawing)
    dist.barrier()
    return folder


def check_train_config(config: TrainConfig, schema: Schema) -> None:
    """Refuse settings that name labels or groups the dataset does not have."""
    for key, names in (("task_weights", list(config.task_weights)), ("monitor_task", [config.monitor_task])):
        for name in {*names} - {*schema.labels, None}:
            raise ValueError(f"train.{key} names {name!r}; the labels are {', '.join(schema.labels)}")
    if not any(config.task_weights.get(label, 1.0) for label in schema.labels):
        raise ValueError(f"train.task_weights gives every label of {', '.join(schema.labels)} 0; leave one above it")
    if config.monitor == "gauc" and schema.group_id is None:
        raise ValueError(f"train.monitor: gauc needs a group id, which dataset {schema.name!r} does not have; use auc")


def open_reader(
    config: RunConfig,
    folder: Path,
    schema: Schema,
    split: str,
    rank: int,
    world_size: int,
    to_train: bool | None = None,
) -> Reader:
    """A split for this rank, shuffled ``to_train`` or in order to evaluate; None: as its name says."""
    is_train = split == "train" if to_train is None else to_train
    return Reader(
        folder,
        schema,
        split,
        batch_size=config.train.batch_size if is_train else config.train.eval_batch_size,
        rank=rank,
        world_size=world_size,
        num_lanes=config.data.num_lanes,
        seed=config.seed if is_train and config.data.shuffle else None,
        prefetch=config.data.prefetch,
        hide_new=not is_train,
    )


def build_model(
    config: RunConfig, schema: Schema, device: torch.device, world_size: int, local_world_size: int
) -> DistributedModelParallel:
    """The sharded model, with weights that depend on the seed and not on the world size."""
    torch.manual_seed(config.seed)
    dense = build_dense(config, schema)
    over_arch = dense.over_arch
    tables = build_tables(schema, config.embeddings, device.type, over_arch.extra_tables)
    weights = [config.train.task_weights.get(label, 1.0) for label in schema.labels]
    managed = managed_ids(schema, config.embeddings, config.train.batch_size, config.seed, device)
    task = TrainTask(CTRModel(tables, dense, managed), weights)
    topology = build_topology(config.sharding, device.type, world_size, local_world_size)
    fused = config.embeddings.is_fused(device.type)
    rows_per_rank = max(1, config.train.batch_size // world_size)
    names = [table.name for table in tables.embedding_bag_configs()]
    prefetch = config.train.pipeline == "prefetch"
    plan = plan_sharding(task, names, config.sharding, topology, fused, rows_per_rank, prefetch)
    check_managed(
        config.embeddings,
        device.type,
        {name: table.compute_kernel for module in plan.plan.values() for name, table in module.items()},
    )
    model = shard(task, plan, device, config.sharding, config.train.batch_size, config.train.accumulate > 1)
    initialise_tables(model, config.seed, config.embeddings.init_scale)
    if managed is not None:
        managed.bind(model)
    compile_over_arch(over_arch, config.over_arch)
    # Dropout draws of the ranks must differ; everything drawn before must not.
    torch.manual_seed(config.seed * 1_000_003 + dist.get_rank())
    return model


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank ended; that rank says why."""
    return any(text in str(error) for text in ("gloo/transport", "ncclRemoteError", "Connection closed by peer"))


def compile_over_arch(over_arch: OverArch, config: OverArchConfig) -> None:
    """Does what its config's ``compile`` asks for.

    To the method, not to the module: parameters keep their names, and hooks, such as the report's, still run. Dynamic,
    because the last batch of an epoch and those of the evaluation have other rows than the rest.
    """
    if config.compile:
        over_arch.forward = torch.compile(over_arch.forward, dynamic=True)


def is_library_error(error: ValueError) -> bool:
    """Whether ``error`` was raised outside ssr_rec: then it is a bug, and the traceback is wanted."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return not raised_in.is_relative_to(Path(__file__).resolve().parent)


def quiet() -> None:
    """Keep the libraries' start-up chatter out of the progress lines."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
