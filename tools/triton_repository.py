"""Write a model repository of NVIDIA Triton that scores with an artifact; see docs/serving.md.

python tools/triton_repository.py artifacts/ssr_s --out models --name ssr_s && tritonserver --model-repository models
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.serving.triton_repository import write_repository


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        print(write_repository(options.artifact, options.out, options.name, options.max_batch))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a model repository of NVIDIA Triton for an artifact.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the repository, a folder with one of each model")
    parser.add_argument("--name", default="ssr_rec", help="of the model (default ssr_rec)")
    parser.add_argument("--max-batch", type=int, default=1024, help="rows put together (default 1024)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
