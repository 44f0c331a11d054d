"""Serve an artifact over HTTP; see docs/serving.md.

python tools/serve.py artifacts/ssr_s --port 8000 --workers 2
"""

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack(None)

import argparse
import sys
from typing import Any

from pydantic import ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.common.settings import first_problem
from ssr_rec.serving.server_settings import ServerSettings


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        from ssr_rec.serving.server import serve
    except ModuleNotFoundError as error:
        print(f"error: there is no {error.name}: pip install 'ssr_rec[serve]'", file=sys.stderr)
        return 2
    try:
        serve(ServerSettings.model_validate(vars(options)))
    except ValidationError as error:
        print(f"error: {first_problem(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serve an artifact over HTTP until SIGTERM.")
    for name, field in ServerSettings.model_fields.items():
        if field.is_required():
            parser.add_argument(name, help=field.description)
        else:
            more = f"{field.description} (default {field.default})" if field.description else f"default {field.default}"
            kind: Any = field.annotation
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=more)
    return parser


def command() -> int:
    """Run the command line of this process."""
    return main()
