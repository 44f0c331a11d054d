"""Write what changed between two artifacts of one dataset, or apply that to the older one; see docs/serving.md.

python tools/delta.py make artifacts/monday artifacts/tuesday --out artifacts/tuesday.delta
python tools/delta.py apply artifacts/monday artifacts/tuesday.delta --out artifacts/monday
"""

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack("torch")

import argparse
import json
import sys
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.serving.delta import apply_delta, make_delta


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        if options.action == "make":
            print(json.dumps(make_delta(options.older, options.other, options.out)))
        else:
            apply_delta(options.older, options.other, options.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write or apply what changed between two artifacts of one dataset.")
    parser.add_argument("action", choices=("make", "apply"))
    parser.add_argument("older", type=Path, help="artifact")
    parser.add_argument("other", type=Path, help="make: the newer artifact; apply: the delta")
    parser.add_argument("--out", type=Path, required=True, help="make: the delta; apply: the newer artifact")
    return parser


def command() -> int:
    """Run the command line of this process."""
    return main()


if __name__ == "__main__":
    sys.exit(command())
