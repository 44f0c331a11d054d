"""Export a trained run to an artifact for serving; see docs/inference.md.

python tools/export.py runs/ssr_s --out artifacts/ssr_s
python tools/export.py runs/ssr_s --out artifacts/ssr_s_int8 --tables int8 --dense bf16
python tools/export.py runs/ssr_s --out artifacts/ssr_s --onnx
"""

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.common.saying import say
from ssr_rec.serving.export import TOLERANCES, Compared, Form, export_run
from ssr_rec.serving.quantized_tables import Precision


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input and for an artifact that scores otherwise."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        report = export_run(
            options.run,
            options.out,
            Form(options.tables, options.dense, options.onnx),
            data=options.data,
            compared=Compared(options.split, options.rows, options.tolerance),
            note=say,
        )
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Export a trained run to an artifact for serving.")
    parser.add_argument(
        "run", type=Path, help="run folder (its best weights; of a run by days the latest), or a checkpoint in it"
    )
    parser.add_argument("--out", type=Path, required=True, help="artifact folder; an artifact there is replaced")
    parser.add_argument("--tables", choices=get_args(Precision), default="fp32", help="precision of embedding rows")
    parser.add_argument("--dense", choices=["fp32", "bf16"], default="fp32", help="precision of over-arch and heads")
    parser.add_argument(
        "--onnx", action="store_true", help="add model.onnx, of standard operators, float32 (needs ssr_rec[onnx])"
    )
    parser.add_argument("--data", type=Path, help="the run's prepared dataset, where it has moved")
    parser.add_argument(
        "--split", help="fold to compare with the trainer's model on (default: test; of a run by days its last day)"
    )
    parser.add_argument("--rows", type=int, help="rows of the fold to compare (default: all)")
    parser.add_argument(
        "--tolerance", type=float, help=f"largest difference of a probability (default by precision: {TOLERANCES})"
    )
    return parser


def command() -> int:
    """Run the command line of this process."""
    return main()
