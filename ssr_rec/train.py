"""Train one model: ``torchx run dist.ddp -j 2x8 ssr_rec/train.py --config C``, torchrun, or plain python.

Builds everything top to bottom, calls fit(), writes the report. Bad input ends with one line and exit code 2.
"""

from ssr_rec.common.versions import require_stack

# Before torchrec is imported: with a wrong stack that import itself fails, deep in C++.
require_stack()

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from ssr_rec.checkpointing.manager import CheckpointManager
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.common.distributed import on_rank_0
from ssr_rec.common.logs import quiet
from ssr_rec.common.paths import place
from ssr_rec.config.help import config_help
from ssr_rec.config.run import RunConfig, dump_config, load_config
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.runs.exit_codes import exit_code_of
from ssr_rec.runs.log import RunLog
from ssr_rec.runs.open import finished_report
from ssr_rec.runs.report import Report
from ssr_rec.runs.result import build_report, finish_report, show_result
from ssr_rec.runs.search import after_search
from ssr_rec.training.datasets import draw_synthetic, open_rows
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.setup import check_device, check_train_config, share_cores, start_process_group
from ssr_rec.training.stall_watch import StallWatch
from ssr_rec.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train one model on one click log; see README.md.",
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file, such as configs/smoke.yaml; default: SSR-S on the synthetic log")
    parser.add_argument("--print_config", action="store_true", help="show the resolved config and stop")
    known, overrides = parser.parse_known_args(arguments)
    quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is Ctrl-C's equal
    try:
        config = load_config(known.config, overrides)
        if known.print_config:
            print(dump_config(config), end="")
        else:
            train(config)
    except (Exception, KeyboardInterrupt) as error:
        if (code := exit_code_of(error)) is None:
            raise
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def train(config: RunConfig) -> Report:
    """Run ``config`` to its report; every rank calls it and gets the report.

    Raises:
        UserError: bad config or data; the message names the key or file and the fix.
    """
    start_process_group(config.device)
    return train_stage(after_search(config, train_stage))[0]


def train_stage(config: RunConfig) -> tuple[Report, OverArchConfig | None]:
    """Run one training to its report; also return what the over-arch, as training left it, says to train next."""
    device, rank, world_size = start_process_group(config.device), dist.get_rank(), dist.get_world_size()
    check_device(config.train, device)
    local_world_size = share_cores()
    with closing(RunLog(rank, world_size)) as log:
        folder = place(config.data.path) if config.data.path else draw_synthetic(config, log.drawing)
        schema = Schema.read(folder).select(config.data.features, config.data.labels)
        check_train_config(config.train, schema)
        done = on_rank_0(lambda: finished_report(config.model_dump(mode="json"), config.over_arch.label))
        if done is not None and done.dataset.dataset_id in schema.known_ids:
            show_result(log, Path(config.runs) / str(done.name), done)
            return done, None

        rows = open_rows(config, folder, schema, rank, world_size)
        model = build_model(config, schema, device, world_size, local_world_size, folder)
        optimizer = build_optimizer(model, config.optimizer, config.embeddings)
        try:
            start = log.open(config, schema, model.module.model.dense.over_arch, rows.train)
            trainer = Trainer(config, rows, model, optimizer, CheckpointManager(config.checkpoint, log.folder))
            warm_started = trainer.start(start, Here(folder, schema))
        except ValueError:
            log.discard()
            raise
        with closing(StallWatch(config.train.stall_timeout_s)) as trainer.watch:
            for row in trainer.fit():
                log(row)
            following = trainer.over_arch.following_config()
            # A search is what it ended with: its best may come before it has pruned anything.
            ended = trainer.test(of_the_best=following is None)
            if "row" in ended:
                log(ended.pop("row"))
        report = build_report(log, trainer, ended, warm_started)
        finish_report(log, report)
        return report, following


if __name__ == "__main__":
    sys.exit(main())
