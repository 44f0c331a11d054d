"""Compare over-archs on one prepared dataset, with equal search budgets and several seeds.

python tools/compare.py --data data/ml1m_half --over-archs all --seeds 3

Stopped at any time, the same command goes on where it was.
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

import yaml

from ssr_rec.common.logs import quiet
from ssr_rec.common.saying import say
from ssr_rec.common.whole_files import write_text
from ssr_rec.data.schema import Schema
from ssr_rec.studies.command_line import count, stop_politely
from ssr_rec.studies.figure import draw_costs
from ssr_rec.studies.runner import TRAIN_COMMAND, Comparison, open_comparison, run_comparison
from ssr_rec.studies.study import Plan, make_plan
from ssr_rec.studies.study_file import choose, read_study, slug
from ssr_rec.studies.table import comparison_text, runs_frame, summarise


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = TRAIN_COMMAND) -> int:
    """Returns the exit status: 1 when a run failed, 2 for bad input, 130 when stopped."""
    options, overrides = _parser().parse_known_args(arguments)
    quiet()
    try:
        schema = Schema.read(options.data)
        study = choose(read_study(options.study), options.over_archs, options.study)
        plan = make_plan(
            study.model_copy(update={"search_seeds": options.search_seeds or study.search_seeds}),
            schema,
            str(options.data),
            options.seeds,
            trials=options.trials,
            overrides=overrides,
            where=options.study,
        )
        out = options.out or Path("runs") / f"compare-{options.study.stem}-{slug(schema.name)}"
        comparison = open_comparison(plan, out)
        if not options.only_table:
            say(f"{len(plan.trials)} systems, {plan.num_jobs()} runs, {comparison.num_done()} of them there; {out}")
            run_comparison(comparison, options.workers, command, say)
        write_results(comparison)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the runs that have finished", file=sys.stderr)
        return 130
    return 1 if comparison.failed else 0


def write_results(comparison: Comparison) -> None:
    """Write table.md, table.csv, runs.csv, study.yaml and auc_vs_cost.png, and print the table."""
    plan, out = comparison.plan, comparison.out
    frame = summarise(plan, comparison.reports, comparison.workers)
    text = comparison_text(plan, frame)
    write_text(out / "table.md", text)
    write_text(out / "table.csv", frame.to_csv(index=False))
    write_text(out / "runs.csv", runs_frame(plan, comparison.reports, comparison.workers).to_csv(index=False))
    write_text(out / "study.yaml", _resolved_study(plan))
    draw_costs(frame, f"{plan.schema.name}: test AUC against cost, {plan.seeds} seed(s)", out / "auc_vs_cost.png")
    print(text)


def _resolved_study(plan: Plan) -> str:
    head = f"# As run on {plan.schema.name} ({plan.schema.dataset_id}) with --seeds {plan.seeds}.\n"
    return head + yaml.safe_dump(plan.study.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: --seed=1 would otherwise be taken for --seeds.
    parser = argparse.ArgumentParser(
        description="Compare over-archs on one dataset: equal budgets, several seeds, one table.",
        epilog="Any config key, for every run: --train.batch_size=512",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/prepare_data.py")
    parser.add_argument("--over-archs", nargs="+", default=["all"], metavar="NAME", help="systems of the study, or all")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each system's best trial; default 3")
    parser.add_argument("--study", type=Path, default=Path("configs/compare/systems.yaml"), help="what to compare")
    parser.add_argument("--out", type=Path, help="default: runs/compare-STUDY-DATASET")
    parser.add_argument("--trials", type=count, help="search budget of each system, 1: none; default: the study's")
    parser.add_argument(
        "--search-seeds", type=count, help="seeds of each trial, whose mean decides; default: the study's"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=count, default=cores, help="runs at a time, one core each; default: cores")
    parser.add_argument("--only-table", action="store_true", help="train nothing, redraw from what there is")
    return parser


def command() -> int:
    """Run the command line of this process."""
    stop_politely()
    return main()
