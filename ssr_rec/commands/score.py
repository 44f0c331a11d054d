"""Score a file of raw rows with an artifact; see docs/inference.md.

python tools/score.py artifacts/ssr_s --input rows.parquet --output scores.parquet --keep user_id video_id
"""

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import time
from pathlib import Path

import torch

from ssr_rec.common import stopping
from ssr_rec.common.logs import quiet
from ssr_rec.common.saying import say
from ssr_rec.data.splits import Lookups
from ssr_rec.serving import load
from ssr_rec.serving.score_file import score_file


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()

    def progress(rows: int) -> None:
        stopping.check()
        seconds = time.perf_counter() - started
        say(f"scored {rows:,} rows, {rows / seconds:,.0f} rows/s", {"rows": rows, "seconds": seconds})

    try:
        scorer = load(options.artifact)
        rows = score_file(scorer, options.input, options.output, options.keep, progress)
    except (Exception, KeyboardInterrupt) as error:
        return stopping.exit_status(error, f": {options.output} is as it was before")
    seconds = time.perf_counter() - started
    values = {name: _shares(found) for name, found in scorer.values.counts().items()}
    print(json.dumps({"rows": rows, "seconds": round(seconds, 3), "output": str(options.output), "values": values}))
    return 0


def _shares(found: Lookups) -> dict[str, float]:
    return {"missing": round(found.share("missing"), 4), "unknown": round(found.share("oov"), 4)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score a file of raw rows with an artifact.")
    parser.add_argument("artifact", type=Path, help="folder made by tools/export.py")
    parser.add_argument("--input", type=Path, required=True, help="parquet, CSV or TSV; text also as .gz")
    parser.add_argument("--output", type=Path, required=True, help="parquet of the kept columns and p_<label>")
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="columns of the input to carry over")
    parser.add_argument("--threads", type=int, choices=range(1, 1025), metavar="N", help="of torch (default: all)")
    return parser


def command() -> int:
    """Run the command line of this process."""
    # So that a polite kill, like Ctrl-C, removes what is half-written.
    stopping.listen()
    return main()
