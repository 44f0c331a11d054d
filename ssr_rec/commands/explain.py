"""Ask a trained run what it relies on, where it is worst, how calibrated it is and how its inputs have drifted.

python tools/explain.py runs/ssr_s
python tools/explain.py runs/ssr_s --split validation --slices tab hour --order calibration --group city=city,region
"""

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ssr_rec.common import stopping
from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.common.saying import say
from ssr_rec.explaining.explanation import Question, explain_run
from ssr_rec.explaining.figures import draw_all
from ssr_rec.explaining.slices import ORDERS
from ssr_rec.explaining.text import tables
from ssr_rec.runs.folder import write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()

    def note(text: str) -> None:
        stopping.check()
        say(f"{time.perf_counter() - started:.0f} s: {text}")

    try:
        asked = Question(
            split=options.split,
            rows=options.rows,
            importance_rows=options.importance_rows,
            seeds=options.seeds,
            groups=dict(_group(text) for text in options.group),
            columns=options.slices,
            min_rows=options.min_rows,
            order=options.order,
        )
        found = explain_run(options.run, asked, options.data, note)
        folder = options.output or options.run / "explain" / found["split"]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "explain.json", found)
        (folder / "explain.md").write_text(tables(found, sys.maxsize) + "\n")
        pictures = draw_all(found, folder)
    except (Exception, KeyboardInterrupt) as error:
        return stopping.exit_status(error, "")
    print(tables(found, options.lines))
    said = {"seconds": round(time.perf_counter() - started, 1), "json": str(folder / "explain.json")}
    print(json.dumps({**said, "pictures": [str(path) for path in pictures]}))
    return 0


def _group(text: str) -> tuple[str, list[str]]:
    name, _, columns = text.partition("=")
    if not name or not columns or not all(columns.split(",")):
        raise UserError(f"--group {text}: give NAME=COLUMN,COLUMN")
    return name, columns.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Ask a trained run what it relies on, where it is worst, how calibrated it is and how its inputs "
        "have drifted: tables, explain.json and pictures; see docs/explaining.md."
    )
    count: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--split", help="whose rows (default: test, or the last day of a dataset by days)")
    parser.add_argument("--rows", **count, help="first rows of the split (default: all)")
    parser.add_argument("--importance-rows", **count, default=20_000, help="of them for the permutations")
    parser.add_argument("--seeds", **count, default=3, help="permutations of each column")
    parser.add_argument(
        "--group", action="append", default=[], metavar="NAME=COLUMN,...", help="columns to exchange together as well"
    )
    parser.add_argument(
        "--slices",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns to slice by (default: all of one value a row)",
    )
    parser.add_argument("--min-rows", **count, default=200, help="rows that earn a value a slice of its own")
    parser.add_argument("--order", choices=ORDERS, default="auc", help="by what the worst slice comes first")
    parser.add_argument("--lines", **count, default=25, help="most lines of a printed table")
    parser.add_argument("--data", type=Path, help="the run's prepared dataset, where it has moved")
    parser.add_argument("--output", type=Path, help="folder of the answers (default: explain/SPLIT in the run folder)")
    parser.add_argument("--threads", **count, help="of torch (default: all)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def command() -> int:
    """Run the command line of this process."""
    # So that a polite kill, like Ctrl-C, removes what is half-written.
    stopping.listen()
    return main()
