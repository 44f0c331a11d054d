"""Compare finished runs: ``python tools/show_runs.py RUN [RUN ...] [--plot PATH] [--html PATH]``.

Prints a Markdown table of the runs, best first under the dataset's ceiling, and one sentence per task; of runs with a
domain (or train.metrics_by) also the measures of each of its values. Of runs by days (data.days), whose test is the
mean over the next days, also a table and a picture by day. The page of ``--html`` needs nothing beside it.
A folder without a finished run ends it with exit code 2 and a line that says what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import write_text
from ssr_rec.runs.by_value import by_value_table
from ssr_rec.runs.report import read_run
from ssr_rec.runs.table import runs_table, summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare finished runs: a table, a sentence and a picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder, such as runs/ssr_s-1")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="also draw validation and test AUC as a PNG")
    parser.add_argument("--html", metavar="PATH", type=Path, help="also write all that is known of them as one page")
    chosen = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in chosen.runs]
        print(runs_table(runs), summary(runs), sep="\n\n")
        for run in runs:
            if table := by_value_table(run.report):
                print(f"\n{run.report.name}\n\n{table}")
        by_days = all(run.report.days for run in runs)
        # Imported here: matplotlib takes a second, and the table alone does not need it.
        if by_days:
            from ssr_rec.runs.days import days_table, draw_days

            print(f"\n{days_table(runs)}")
            if chosen.plot is not None:
                draw_days(runs, chosen.plot)
        elif chosen.plot is not None:
            from ssr_rec.runs.curves import draw_comparison

            draw_comparison(runs, chosen.plot)
        if chosen.html is not None:
            from ssr_rec.runs.html_page import runs_page

            write_text(chosen.html, runs_page(chosen.runs))
    except (UserError, OSError) as error:
        print(f"show_runs: {error}", file=sys.stderr)
        return 2
    return 0


def command() -> int:
    """Run the command line of this process."""
    return main()
