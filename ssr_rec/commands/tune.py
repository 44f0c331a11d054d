"""Search the settings of a run with Optuna, several trainings at a time.

ssr-rec tune --space configs/tune/kuairand.yaml --data data/kuairand --out runs/tune-kuairand --workers 2

Stopped or killed at any time, the same command goes on where it was; started twice, both work on one search.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

# Before torchrec is imported: with a wrong stack that import itself fails, deep in C++.
require_stack("torch")

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssr_rec.common.logs import quiet
from ssr_rec.common.saying import say
from ssr_rec.common.whole_files import write_text
from ssr_rec.config.run import dump_config
from ssr_rec.data.schema import Schema
from ssr_rec.studies.command_line import count, stop_politely
from ssr_rec.studies.runner import TRAIN_COMMAND
from ssr_rec.studies.search_space import check_tuning, read_tuning
from ssr_rec.studies.study_file import slug
from ssr_rec.studies.trials import TrialBook
from ssr_rec.studies.tuner import Tuner, best_config, metric_name
from ssr_rec.studies.tuning_results import draw_tuning, importances, save_picture, trials_frame, tuning_text


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = TRAIN_COMMAND) -> int:
    """Returns the exit status: 1 when a trial failed, 2 for bad input, 130 when stopped."""
    options, overrides = _parser().parse_known_args(arguments)
    quiet()
    try:
        schema, data = Schema.read(options.data), str(options.data)
        tuning = read_tuning(options.space, overrides)
        if options.trials is not None:
            tuning = tuning.model_copy(update={"trials": options.trials})
        first = check_tuning(tuning, schema, data, options.space)
        out = options.out or Path("runs") / f"tune-{options.space.stem}-{slug(schema.name)}"
        book = TrialBook(out, tuning, first, schema.dataset_id)
        if not options.only_table:
            ended = len(book.in_state("COMPLETE", "PRUNED", "FAIL"))
            say(f"{metric_name(book.train)}, {tuning.trials} trials, {ended} of them there; {out}")
            Tuner(book, data, options.workers, command, say).run()
        write_results(book, data, f"{schema.name}   ·   {options.space.stem}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 1 if book.in_state("FAIL") else 0


def write_results(book: TrialBook, data: str, title: str) -> None:
    """Write trials.csv, table.md, trials.png and best.yaml, and print the table.

    Raises:
        UserError: no trial has ended.
    """
    if not book.in_state("COMPLETE", "PRUNED", "FAIL"):
        raise UserError(f"{book.out}: no trial has ended, so there is nothing to tabulate")
    frame, shares = trials_frame(book), importances(book)
    text = tuning_text(book, frame, shares)
    write_text(book.out / "trials.csv", frame.to_csv(index=False))
    write_text(book.out / "table.md", text)
    save_picture(draw_tuning(book, frame, shares, title), book.out / "trials.png")
    print(text)
    best, config = book.best(), best_config(book, data)
    if best is not None and config is not None:
        head = f"# Trial {best.number} of {len(frame)}: {metric_name(book.train)} {best.value:.6f}.\n"
        write_text(book.out / "best.yaml", head + dump_config(config))
        print(f"best: trial {best.number}; train it again with --config {book.out / 'best.yaml'}")


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: --trial=1 would otherwise be taken for --trials.
    parser = argparse.ArgumentParser(
        description="Search the settings of a run with Optuna: every trial a run folder, the best one a ready config.",
        epilog="Any config key, for every trial: --train.batch_size=512. Several of these commands may share an --out.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/prepare_data.py")
    parser.add_argument("--space", type=Path, required=True, help="what to search, such as configs/tune/kuairand.yaml")
    parser.add_argument("--out", type=Path, help="folder of the search; default: runs/tune-SPACE-DATASET")
    parser.add_argument("--trials", type=count, help="runs in all; default: the file's")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=count, default=cores, help="trainings at a time; default: one per core")
    parser.add_argument("--only-table", action="store_true", help="train nothing, write table and picture anew")
    return parser


def command() -> int:
    """Run the command line of this process."""
    stop_politely()
    return main()
